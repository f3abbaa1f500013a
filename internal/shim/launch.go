// Package shim is the process beside a running VM as other processes see it: they start
// it, claim it, and ask it. What the process itself does is package process.
//
// [Launch] starts a shim and waits until its VM is ready; [Claim] makes one that stands by
// the shim of a VM; [Client] asks a shim that runs. The launcher and the shim talk over two
// pipes:
//
//	launcher -> shim   Spec, then "commit"
//	shim -> launcher   ready or failed, then committed
//
// The launcher's end of the first pipe closes when the launcher dies. Before the
// commit that makes the shim undo everything; after it, it ends an ephemeral VM.
package shim

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/ring"
)

// LaunchOptions are the options of [Launch].
type LaunchOptions struct {
	// Program is the shim's program with its first arguments.
	Program []string
	Spec    Spec
	// Listeners are bound to the host ports of Spec.Forwards, in the same order: a
	// [net.Listener] each, or for UDP a [net.PacketConn]. The shim gets duplicates: the
	// caller closes its own.
	Listeners []io.Closer
	// LogPath receives what the shim itself has to say.
	LogPath string
	// Without are the names of variables that the shim, and so the VMM, does not get from this
	// process's environment: those that have secrets.
	Without []string
	// AnswerTime is how much longer than Spec.ReadyTimeout the shim may take to report that
	// its VM is ready, or why it is not. Zero: 30 seconds.
	AnswerTime time.Duration
}

// Launched is a shim whose VM is ready. Until [Launched.Commit] the VM ends when
// this process does.
type Launched struct {
	// PID and Start name the shim, VMMPID and VMMStart the VMM.
	PID, VMMPID     int
	Start, VMMStart uint64
	// Answer is the agent's, if there is one.
	Answer wire.Answer
	// Timeline says when, since the launch, each step was done.
	Timeline []wire.Step
	// Warnings are what did not go as it should, and did no harm.
	Warnings []string
	// Limits are those of the VMM.
	Limits smolvm.Limits

	ephemeral bool
	kill      func()
	exited    <-chan struct{}
	orders    *os.File // the shim's standard input
	pipe      *os.File // under reports
	reports   *bufio.Reader
}

// Report is one message of the shim to its launcher.
type Report struct {
	Failure *Failure `json:"failure,omitempty"`

	PID      int          `json:"pid,omitempty"`
	Start    uint64       `json:"start,omitempty"`
	VMMPID   int          `json:"vmm_pid,omitempty"`
	VMMStart uint64       `json:"vmm_start,omitempty"`
	Answer   *wire.Answer `json:"answer,omitempty"`
	Timeline []wire.Step  `json:"timeline,omitempty"`
	Warnings []string     `json:"warnings,omitempty"`

	Limits smolvm.Limits `json:"limits,omitzero"`

	Committed bool `json:"committed,omitempty"`
}

// Argument is the first argument of a program that is started as the shim of a VM, or as a
// worker: smolvm, or any that calls Main of this module's package shim.
const Argument = "smolvm-shim"

// The files that a shim inherits beside its standard streams: where it reports to, and the
// listeners of its forwards.
const (
	ReportsFD       = 3
	FirstListenerFD = 4
)

const (
	// CommitOrder confirms a start.
	CommitOrder = "commit"
	// abortTime is how long a shim may take to end its VM, before it is killed, and
	// the VMM with it.
	abortTime = 10 * time.Second
	// answerTime is the default of [LaunchOptions.AnswerTime]. In it a shim whose time is over
	// ends its VMM and reports that; on a busy host that takes seconds.
	answerTime = 30 * time.Second
	// commitTime is how long a shim may take to confirm a commit. It gives a few files their
	// names before.
	commitTime = time.Minute
)

// NoShimHint is what to do about a program that was started as a shim and is none.
const NoShimHint = "the program must be smolvm of this version, or call shim.Main (package github.com/smolvm/smolvm/shim) first in its main"

// Launch starts a shim and returns when its VM is ready. If it fails, or ctx is done
// first, nothing is left. The error matches [smolvm.ErrBootTimeout] if the VM was not
// ready in time, and is a [*smolvm.PrerequisiteError] if the host lacks something. A shim
// that reports nothing in the time that [LaunchOptions] give it is an error too.
func Launch(ctx context.Context, opts LaunchOptions) (*Launched, error) {
	logStart := sizeOf(opts.LogPath)
	l, err := spawn(opts)
	if err != nil {
		return nil, fmt.Errorf("start shim: %w", err)
	}
	if err := l.order(ctx, opts, opts.answerTime(), logStart); err != nil {
		l.Abort(context.WithoutCancel(ctx))
		return nil, err
	}
	return l, nil
}

// answerTime returns how long a shim may take from its start to its report.
func (o LaunchOptions) answerTime() time.Duration {
	return sum(o.Spec.ReadyTimeout, cmp.Or(o.AnswerTime, answerTime))
}

// sum adds times that are not negative, up to the longest there is.
func sum(times ...time.Duration) time.Duration {
	total := time.Duration(0)
	for _, t := range times {
		if total > math.MaxInt64-t {
			return math.MaxInt64
		}
		total += t
	}
	return total
}

// order gives the shim its orders and waits at most limit until the VM is ready. A shim that
// is claimed has its orders already.
func (l *Launched) order(caller context.Context, opts LaunchOptions, limit time.Duration, logStart int64) error {
	ctx, cancel := context.WithTimeout(caller, limit)
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		past := time.Unix(1, 0)
		_, _ = l.orders.SetWriteDeadline(past), l.pipe.SetReadDeadline(past)
	})
	defer stop()
	var err error
	if l.exited != nil {
		var spec []byte
		opts.Spec.Protocol = opts.Spec.protocol()
		if spec, err = json.Marshal(opts.Spec); err == nil {
			_, err = l.orders.Write(append(spec, '\n'))
		}
	}
	var got Report
	if err == nil {
		got, err = l.next()
	}
	switch {
	case caller.Err() != nil:
		err = fmt.Errorf("wait for the VM: %w", context.Cause(caller))
	case ctx.Err() != nil:
		err = opts.silent(limit, logStart)
	case err != nil:
		if l.exited != nil {
			l.Abort(ctx) // it has said in its log what it has to say when it is gone
		}
		err = opts.ended(err, logStart)
	case got.Failure != nil:
		err = got.Failure.Err()
	}
	if err != nil {
		return err
	}
	l.PID, l.Start, l.VMMPID, l.VMMStart = got.PID, got.Start, got.VMMPID, got.VMMStart
	if got.Answer != nil {
		l.Answer = *got.Answer
	}
	l.Timeline, l.Warnings, l.Limits = got.Timeline, got.Warnings, got.Limits
	return nil
}

// silent returns the error of a shim that has reported nothing in time. Most likely the
// program is no shim.
func (o LaunchOptions) silent(limit time.Duration, logStart int64) error {
	if len(o.Program) == 0 {
		return fmt.Errorf("the shim that stood by did not answer within %s", limit)
	}
	return &smolvm.Error{Hint: NoShimHint,
		Err: fmt.Errorf("the program %q did not answer as a shim within %s; %s", o.Program, limit, o.logEnd(logStart))}
}

// ended returns the error of a shim that has ended without a report. Most likely the program
// is no shim; its words say what it is.
func (o LaunchOptions) ended(err error, logStart int64) error {
	if len(o.Program) == 0 {
		return fmt.Errorf("the shim that stood by did not report (%w)", err)
	}
	return &smolvm.Error{Hint: NoShimHint,
		Err: fmt.Errorf("shim %q did not report (%w); %s", o.Program, err, o.logEnd(logStart))}
}

// logEnd quotes what the shim has logged since its log was of that size.
func (o LaunchOptions) logEnd(logStart int64) string {
	if text := tail(o.LogPath, logStart); text != "" {
		return "its log says: " + text
	}
	return "its log is empty"
}

// spawn starts the process, with nothing of ours but what it needs.
func spawn(opts LaunchOptions) (_ *Launched, err error) {
	if len(opts.Program) == 0 {
		return nil, errors.New("no program is given")
	}
	var theirs, ours []*os.File // the shim's are closed when it has them, ours if it never does
	defer func() {
		if err != nil {
			theirs = append(theirs, ours...)
		}
		for _, file := range theirs {
			_ = file.Close()
		}
	}()
	log, err := ring.Append(opts.LogPath, ring.LogBytes)
	if err != nil {
		return nil, err
	}
	theirs = append(theirs, log)
	p, err := makePipes(opts.Listeners)
	if err != nil {
		return nil, err
	}
	theirs, ours = append(theirs, p.theirs()...), []*os.File{p.ordersWrite, p.reportsRead}
	argv := append(opts.Program[1:len(opts.Program):len(opts.Program)], opts.Spec.ID)
	cmd := exec.Command(opts.Program[0], argv...) //nolint:noctx // it outlives the call that starts it
	cmd.Dir, cmd.Env = "/", environWithout(opts.Without)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = p.ordersRead, log, log
	cmd.ExtraFiles = append([]*os.File{ReportsFD - 3: p.reportsWrite}, p.listeners...)
	// A session of its own: neither a terminal's signals nor its end reach it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // no zombie is left while this process lives
		close(exited)
	}()
	return &Launched{
		PID:       cmd.Process.Pid,
		ephemeral: opts.Spec.Ephemeral,
		kill:      func() { _ = cmd.Process.Kill() },
		exited:    exited,
		orders:    p.ordersWrite,
		pipe:      p.reportsRead,
		reports:   bufio.NewReader(p.reportsRead),
	}, nil
}

// environWithout returns the environment of this process without some variables.
func environWithout(names []string) []string {
	return slices.DeleteFunc(os.Environ(), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		return slices.Contains(names, name)
	})
}

// pipes are what a launcher and a shim talk over, and what the shim takes over.
type pipes struct {
	ordersRead, ordersWrite   *os.File
	reportsRead, reportsWrite *os.File
	listeners                 []*os.File
}

func makePipes(listeners []io.Closer) (p pipes, err error) {
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.ordersRead, p.ordersWrite, err = os.Pipe(); err != nil {
		return p, err
	}
	if p.reportsRead, p.reportsWrite, err = os.Pipe(); err != nil {
		return p, err
	}
	for _, listener := range listeners {
		file, err := fileOf(listener)
		if err != nil {
			return p, err
		}
		p.listeners = append(p.listeners, file)
	}
	return p, nil
}

// theirs are the shim's.
func (p pipes) theirs() []*os.File {
	return append([]*os.File{p.ordersRead, p.reportsWrite}, p.listeners...)
}

func (p pipes) close() {
	for _, file := range append(p.theirs(), p.ordersWrite, p.reportsRead) {
		_ = file.Close() // of one that was not made it is an error, and nothing else
	}
}

func fileOf(listener io.Closer) (*os.File, error) {
	filer, ok := listener.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, fmt.Errorf("%T has no file to hand over", listener)
	}
	return filer.File()
}

func (l *Launched) next() (Report, error) {
	var got Report
	line, err := l.reports.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &got)
	}
	return got, err
}

// Commit makes the VM independent of this process, but for an ephemeral one, which
// ends when this process does. It returns when the shim has confirmed, or has not in a
// minute. If it fails, the VM has ended or is to be ended by Abort.
func (l *Launched) Commit() error {
	limit := time.Now().Add(commitTime)
	_, _ = l.orders.SetWriteDeadline(limit), l.pipe.SetReadDeadline(limit)
	_, err := l.orders.WriteString(CommitOrder + "\n")
	var got Report
	if err == nil || errors.Is(err, syscall.EPIPE) { // then the shim has said why it ended
		got, err = l.next()
	}
	switch {
	case err != nil:
		return fmt.Errorf("confirm the start to the shim: %w", err)
	case got.Failure != nil:
		return got.Failure.Err()
	case !got.Committed:
		return errors.New("confirm the start to the shim: unexpected answer")
	}
	_ = l.pipe.Close()
	if !l.ephemeral {
		_ = l.orders.Close()
		return nil
	}
	// The end of this pipe tells the shim of ours. The garbage collector must not close
	// it, so it is held as long as the shim lives.
	go func() {
		<-l.exited
		_ = l.orders.Close()
	}()
	return nil
}

// Abort ends the VM and returns when the shim is gone. A shim that takes long, or
// longer than ctx, is killed; the VMM goes with it.
func (l *Launched) Abort(ctx context.Context) {
	_ = l.orders.Close()
	_ = l.pipe.Close()
	ctx, cancel := context.WithTimeout(ctx, abortTime)
	defer cancel()
	select {
	case <-l.exited:
	case <-ctx.Done():
		l.kill()
		<-l.exited
	}
}

// tail is the end of a log, as one line, without what was there before start.
func tail(path string, start int64) string {
	file, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer func() { _ = file.Close() }()
	end := sizeOf(path)
	if start > end {
		start = 0 // it is another file since
	}
	_, _ = file.Seek(max(start, end-ring.QuoteBytes), io.SeekStart)
	text, _ := io.ReadAll(io.LimitReader(file, ring.QuoteBytes))
	return ring.LastLines(string(text), ring.QuoteLines)
}

func sizeOf(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}
