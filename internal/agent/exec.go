package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// exitNotRun is the exit status of a command that can't be started, as shells have it.
const exitNotRun = 126

// Exec runs a command and returns how it ended. When ctx is done, the command and all
// that it has started is killed, and Exec returns whatever the guest does, or the
// command's reader and writers do.
func (c *Client) Exec(ctx context.Context, command smolvm.Command) (smolvm.ExitStatus, error) {
	r, err := c.run(ctx, command)
	if err != nil {
		return smolvm.ExitStatus{}, err
	}
	return r.wait(ctx)
}

// running is a command that was sent to a guest.
type running struct {
	call *call // nil: the command was refused before it was sent
	out  outputs
	// over is closed when nobody waits for the command any more.
	over chan struct{}
	// copied is closed when all the output has been copied and the command is over; copyErr
	// is what came of it.
	copied  chan struct{}
	copyErr error
	refused smolvm.ExitStatus
}

// run sends a command to the guest. The caller waits for it.
func (c *Client) run(ctx context.Context, command smolvm.Command) (*running, error) {
	payload, words := execRequest(command).Pack()
	return c.runOver(ctx, wire.ExecChannel, payload, words, command)
}

// runOver sends a command over a channel of a type, whose request was packed.
func (c *Client) runOver(ctx context.Context, kind string, payload, words []byte, command smolvm.Command) (*running, error) {
	r := &running{out: newOutputs(command), over: make(chan struct{}), copied: make(chan struct{})}
	if len(words) > wire.MaxWords {
		// As the agent says it of what the guest's kernel does not take.
		_, r.copyErr = fmt.Fprintf(r.out.stderr, "smolvm: %s: argument list too long\n", command.Args[0])
		r.refused = smolvm.ExitStatus{Code: exitNotRun}
		return r, nil
	}
	call, err := c.open(ctx, kind, payload)
	if err != nil {
		return nil, err
	}
	call.kills = true
	r.call = call
	go feed(call, words, command, r.over)
	go func() {
		defer close(r.copied)
		r.copyErr = r.out.copy(call)
	}()
	return r, nil
}

// wait returns how the command ended. When ctx is done it kills the command.
func (r *running) wait(ctx context.Context) (smolvm.ExitStatus, error) {
	defer close(r.over)
	if r.call == nil {
		return r.refused, r.copyErr
	}
	select {
	case <-r.copied:
		return r.call.status, errors.Join(r.call.explain(r.call.err), r.copyErr)
	case <-ctx.Done():
	}
	r.call.abandon()
	var status smolvm.ExitStatus
	select {
	case <-r.copied:
		status = r.call.status
	case <-time.After(answerTime):
	}
	r.out.seal()
	return status, context.Cause(ctx)
}

// feed sends a command its words, what it is to read, and its signals. Nobody waits for
// it: a reader may block for ever.
func feed(call *call, words []byte, command smolvm.Command, over <-chan struct{}) {
	if len(words) > 0 {
		if _, err := call.Write(words); err != nil {
			return
		}
	}
	go forwardRequests(call, command, over)
	if command.Stdin != nil {
		_, _ = io.Copy(call, command.Stdin)
		_ = call.CloseWrite()
	}
}

func execRequest(command smolvm.Command) wire.ExecRequest {
	request := wire.ExecRequest{
		Args:    command.Args,
		Env:     command.Env,
		Dir:     command.Dir,
		User:    command.User,
		NoStdin: command.Stdin == nil,
	}
	if tty := command.TTY; tty != nil {
		request.TTY = &wire.TTY{Term: tty.Term, Columns: tty.Size.Columns, Rows: tty.Size.Rows}
		if request.TTY.Term == "" {
			request.TTY.Term = "xterm"
		}
		if request.TTY.Columns <= 0 || request.TTY.Rows <= 0 {
			request.TTY.Columns, request.TTY.Rows = 80, 24
		}
	}
	return request
}

// outputs are where a command's output goes. As in os/exec, one writer may serve as both,
// and is then called by one goroutine at a time.
type outputs struct{ stdout, stderr *output }

func newOutputs(command smolvm.Command) outputs {
	stdout := newOutput(command.Stdout)
	if command.Stdout != nil && sameWriter(command.Stdout, command.Stderr) {
		return outputs{stdout, stdout}
	}
	return outputs{stdout, newOutput(command.Stderr)}
}

func sameWriter(a, b io.Writer) bool {
	defer func() { _ = recover() }() // types that can't be compared are not the same
	return a == b
}

// copy copies a command's output until the command is over.
func (o outputs) copy(call *call) error {
	var both sync.WaitGroup
	var outErr, errErr error
	both.Go(func() {
		// The command is told as by a broken pipe; see OpenSSH's PROTOCOL, section 2.1.
		outErr = copyOut(o.stdout, call, func() { _, _ = call.SendRequest("eow@openssh.com", false, nil) })
	})
	both.Go(func() { errErr = copyOut(o.stderr, call.Stderr(), func() {}) })
	<-call.over
	both.Wait()
	return errors.Join(outErr, errErr)
}

// copyOut copies output to w. If w fails, the rest is still read, so that the command is
// not held up.
func copyOut(w io.Writer, r io.Reader, failed func()) error {
	_, err := io.Copy(w, r)
	if err != nil {
		go failed()
		_, _ = io.Copy(io.Discard, r)
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// seal keeps the writers from being called from now on, unless one of them blocks.
func (o outputs) seal() {
	o.stdout.seal()
	o.stderr.seal()
}

// sealTime is how long a writer may take to return once its call has been given up.
const sealTime = 100 * time.Millisecond

var errSealed = errors.New("the call has returned")

// output is a writer that is called by one goroutine at a time, until it is sealed.
type output struct {
	w      io.Writer
	turn   chan struct{} // holds an element while w is called
	sealed atomic.Bool
}

func newOutput(w io.Writer) *output {
	if w == nil {
		w = io.Discard
	}
	return &output{w: w, turn: make(chan struct{}, 1)}
}

// Write implements [io.Writer].
func (o *output) Write(p []byte) (int, error) {
	o.turn <- struct{}{}
	defer func() { <-o.turn }()
	if o.sealed.Load() {
		return 0, errSealed
	}
	return o.w.Write(p)
}

func (o *output) seal() {
	o.sealed.Store(true)
	select {
	case o.turn <- struct{}{}:
		<-o.turn
	case <-time.After(sealTime):
	}
}

// forwardRequests sends signals and window sizes until the command is over.
func forwardRequests(channel ssh.Channel, command smolvm.Command, over <-chan struct{}) {
	var resizes <-chan smolvm.WindowSize
	if command.TTY != nil {
		resizes = command.TTY.Resizes
	}
	signals := command.Signals
	for {
		select {
		case name, ok := <-signals:
			if !ok {
				signals = nil
				continue
			}
			payload := ssh.Marshal(struct{ Name string }{string(name)})
			_, _ = channel.SendRequest("signal", false, payload)
		case size, ok := <-resizes:
			if !ok {
				resizes = nil
				continue
			}
			_, _ = channel.SendRequest("window-change", false, resizePayload(size))
		case <-over:
			return
		}
	}
}

func resizePayload(size smolvm.WindowSize) []byte {
	return ssh.Marshal(struct{ Columns, Rows, Width, Height uint32 }{uint32(size.Columns), uint32(size.Rows), 0, 0})
}
