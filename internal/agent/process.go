package agent

import (
	"context"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// Process is a command that runs in a guest. It implements [smolvm.Process].
type Process struct {
	running *running
	pid     int

	// ended is closed when the command has ended, as status and err say.
	ended  chan struct{}
	status smolvm.ExitStatus
	err    error
}

// StartProcess starts a command and returns when it runs, or has failed to. Ctx is of the
// start only; when it is done first, the command is killed.
func (c *Client) StartProcess(ctx context.Context, command smolvm.Command) (*Process, error) {
	r, err := c.run(ctx, command)
	if err != nil {
		return nil, err
	}
	p := &Process{running: r, ended: make(chan struct{})}
	if r.call != nil {
		if p.pid, err = r.call.askPID(ctx); err != nil {
			_, _ = r.wait(ctx) // which is done, so this kills the command
			return nil, err
		}
	}
	go func() {
		defer close(p.ended)
		p.status, p.err = r.wait(context.WithoutCancel(ctx))
	}()
	return p, nil
}

// askPID asks the guest for the process id of the command; zero if it does not tell, or the
// command could not be started.
func (k *call) askPID(ctx context.Context) (int, error) {
	replied := make(chan bool, 1)
	go func() {
		ok, err := k.SendRequest(wire.PIDRequest, true, nil)
		replied <- ok && err == nil
	}()
	select {
	case ok := <-replied:
		if !ok {
			return 0, nil
		}
	case <-k.over:
		return 0, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	select { // it was sent before the reply, but is read by another goroutine
	case pid := <-k.pid:
		return pid, nil
	case <-k.over:
		return 0, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// PID implements [smolvm.Process].
func (p *Process) PID() int { return p.pid }

// Wait implements [smolvm.Process].
func (p *Process) Wait(ctx context.Context) (smolvm.ExitStatus, error) {
	select {
	case <-p.ended:
		return p.status, p.err
	case <-ctx.Done():
		return smolvm.ExitStatus{}, context.Cause(ctx)
	}
}

// Signal implements [smolvm.Process].
func (p *Process) Signal(ctx context.Context, signal smolvm.Signal) error {
	if wire.SignalNumber(string(signal)) == 0 {
		return &smolvm.ValidationError{Fields: []smolvm.FieldError{{Field: "signal", Problem: string(signal) + " is not known; use a name such as TERM"}}}
	}
	return p.send(ctx, "signal", ssh.Marshal(struct{ Name string }{string(signal)}))
}

// Resize implements [smolvm.Process].
func (p *Process) Resize(ctx context.Context, size smolvm.WindowSize) error {
	return p.send(ctx, "window-change", resizePayload(size))
}

// send sends a request to the command, unless it has ended.
func (p *Process) send(ctx context.Context, name string, payload []byte) error {
	if p.running.call == nil {
		return nil
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = p.running.call.SendRequest(name, false, payload) // fails when the channel has ended
	}()
	select {
	case <-sent:
		return nil
	case <-p.ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
