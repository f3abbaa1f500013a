package shim

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/proc"
)

// ClaimOrder is what a shim that stands by is sent, as a line of JSON. With it come the files
// that a shim inherits otherwise: its orders, its reports, and the listeners; and before
// the listeners the lock of its slot.
type ClaimOrder struct {
	Spec Spec `json:"spec"`
	// Dir holds the slot's files, by their names of before.
	Dir string `json:"dir"`
	// Names are the paths that files of the slot get when the start is confirmed.
	Names map[string]string `json:"names,omitempty"`

	// Dismiss has the shim end instead.
	Dismiss bool `json:"dismiss,omitempty"`
}

// Dismissed is the answer to a dismissal.
const Dismissed = "dismissed\n"

// Slot is what [Claim] needs to know of a shim that stands by.
type Slot struct {
	// StandbyDir is the shim's runtime directory.
	StandbyDir string
	// Dir holds the slot's files, to which the claimer has moved them.
	Dir string
	// Names are the paths that the files get as the VM's, by their names in Dir. The
	// shim gives them when the start is committed, and removes Dir.
	Names map[string]string
	// Lock is a lock of the slot, which the shim shares until then.
	Lock *os.File
}

// Dismiss ends a shim that stands by, and returns when it has agreed. The error matches
// [ErrGone] if none stands by there: it has been claimed, or has ended.
func Dismiss(ctx context.Context, standbyDir string) error {
	conn, err := dialUnix(ctx, ClaimSocket(standbyDir))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	text, err := json.Marshal(ClaimOrder{Dismiss: true})
	if err == nil {
		_, err = conn.Write(append(text, '\n'))
	}
	answer := make([]byte, len(Dismissed))
	if err == nil {
		_, err = io.ReadFull(conn, answer)
	}
	if err == nil && string(answer) != Dismissed {
		err = fmt.Errorf("unexpected answer %q", answer)
	}
	if err != nil {
		return fmt.Errorf("dismiss a shim: %w", err)
	}
	return nil
}

// Claim is [Launch] by a shim that stands by. Program and LogPath of the options are not
// used. The error matches [ErrGone] if the shim is not there any more, or has been
// claimed by somebody else. A shim that hangs is an error, as in [Launch]; it is the
// caller's to end.
func Claim(ctx context.Context, slot Slot, opts LaunchOptions) (*Launched, error) {
	opts.Program = nil
	bounded, cancel := context.WithTimeoutCause(ctx, opts.answerTime(), opts.silent(opts.answerTime(), 0))
	defer cancel()
	conn, err := dialUnix(bounded, ClaimSocket(slot.StandbyDir))
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(bounded, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	p, err := makePipes(opts.Listeners)
	if err != nil {
		return nil, fmt.Errorf("claim a VM: %w", err)
	}
	defer func() {
		for _, file := range p.theirs() {
			_ = file.Close()
		}
	}()
	opts.Spec.Protocol = opts.Spec.protocol()
	text, err := json.Marshal(ClaimOrder{Spec: opts.Spec, Dir: slot.Dir, Names: slot.Names})
	if err == nil {
		files := append([]*os.File{p.ordersRead, p.reportsWrite, slot.Lock}, p.listeners...)
		var fds []int
		for _, file := range files {
			fds = append(fds, int(file.Fd()))
		}
		err = send(conn, append(text, '\n'), unix.UnixRights(fds...))
	}
	if err != nil {
		_, _ = p.ordersWrite.Close(), p.reportsRead.Close()
		if bounded.Err() != nil {
			return nil, fmt.Errorf("claim a VM: %w", context.Cause(bounded))
		}
		return nil, fmt.Errorf("claim a VM: %w: %w", ErrGone, err)
	}
	l := &Launched{
		ephemeral: opts.Spec.Ephemeral,
		orders:    p.ordersWrite,
		pipe:      p.reportsRead,
		reports:   bufio.NewReader(p.reportsRead),
	}
	for _, file := range p.theirs() {
		_ = file.Close() // so that the shim's end ends the reports
	}
	if err := l.order(ctx, opts, opts.answerTime(), 0); err != nil {
		_, _ = l.orders.Close(), l.pipe.Close()
		return nil, err
	}
	l.follow()
	return l, nil
}

// follow watches a shim that is no child of this process.
func (l *Launched) follow() {
	exited := make(chan struct{})
	l.exited = exited
	l.kill = func() { _ = proc.Kill(context.Background(), l.PID, l.Start) }
	go func() {
		_ = proc.Wait(context.Background(), l.PID, l.Start)
		close(exited)
	}()
}

func send(conn net.Conn, text, rights []byte) error {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return errors.New("not a unix socket")
	}
	n, _, err := unixConn.WriteMsgUnix(text, rights, nil)
	for err == nil && n < len(text) {
		var more int
		more, err = unixConn.Write(text[n:])
		n += more
	}
	return err
}
