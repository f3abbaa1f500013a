package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// Exec runs a command and returns how it ended. When ctx is done it is killed.
func (c *Client) Exec(ctx context.Context, command smolvm.Command) (smolvm.ExitStatus, error) {
	channel, requests, err := c.open(ctx, wire.ExecChannel, execRequest(command))
	if err != nil {
		return smolvm.ExitStatus{}, err
	}
	// Closing the channel makes the agent kill the command's process group.
	stop := context.AfterFunc(ctx, func() { _ = channel.Close() })
	defer stop()
	over := make(chan struct{})
	defer close(over)
	if command.Stdin != nil {
		// Nobody waits for this: a reader may block for ever.
		go func() {
			_, _ = io.Copy(channel, command.Stdin)
			_ = channel.CloseWrite()
		}()
	}
	go forwardRequests(channel, command, over)

	stdout, stderr := outputs(command)
	var output sync.WaitGroup
	var outErr, errErr error
	output.Go(func() { outErr = copyOut(stdout, channel) })
	output.Go(func() { errErr = copyOut(stderr, channel.Stderr()) })
	status, err := exitStatus(requests)
	output.Wait()
	_ = channel.Close()
	if ctx.Err() != nil {
		return status, context.Cause(ctx)
	}
	return status, errors.Join(err, outErr, errErr)
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

// outputs returns where output goes. As in os/exec, one writer may serve as both, and
// is then called by one goroutine at a time.
func outputs(command smolvm.Command) (stdout, stderr io.Writer) {
	stdout, stderr = command.Stdout, command.Stderr
	if stdout != nil && sameWriter(stdout, stderr) {
		shared := &sharedWriter{w: stdout}
		return shared, shared
	}
	return stdout, stderr
}

func sameWriter(a, b io.Writer) bool {
	defer func() { _ = recover() }() // types that can't be compared are not the same
	return a == b
}

// sharedWriter lets two goroutines write by turns.
type sharedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *sharedWriter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}

// copyOut copies output to w. If w fails, the rest is still read, so that the
// command is not held up.
func copyOut(w io.Writer, r io.Reader) error {
	if w == nil {
		w = io.Discard
	}
	_, err := io.Copy(w, r)
	if err != nil {
		_, _ = io.Copy(io.Discard, r)
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// forwardRequests sends signals and window sizes until the command is over.
func forwardRequests(channel ssh.Channel, command smolvm.Command, over <-chan struct{}) {
	var resizes <-chan smolvm.WindowSize
	if command.TTY != nil {
		resizes = command.TTY.Resizes
	}
	signals := command.Signals
	for signals != nil || resizes != nil {
		select {
		case name, ok := <-signals:
			if !ok {
				signals = nil
				continue
			}
			payload := ssh.Marshal(struct{ Name string }{name})
			_, _ = channel.SendRequest("signal", false, payload)
		case size, ok := <-resizes:
			if !ok {
				resizes = nil
				continue
			}
			payload := ssh.Marshal(struct{ Columns, Rows, Width, Height uint32 }{
				uint32(size.Columns), uint32(size.Rows), 0, 0,
			})
			_, _ = channel.SendRequest("window-change", false, payload)
		case <-over:
			return
		}
	}
}

// exitStatus reads requests until the channel ends, and returns the status that was
// among them.
func exitStatus(requests <-chan *ssh.Request) (smolvm.ExitStatus, error) {
	var status smolvm.ExitStatus
	err := errors.New("connection to the guest was lost before the command ended")
	for request := range requests {
		switch request.Type {
		case "exit-status":
			var message struct{ Code uint32 }
			if err = ssh.Unmarshal(request.Payload, &message); err == nil {
				status = smolvm.ExitStatus{Code: int(message.Code)}
			}
		case "exit-signal":
			var message struct {
				Name       string
				CoreDumped bool
				Message    string
				Language   string
			}
			if err = ssh.Unmarshal(request.Payload, &message); err == nil {
				status = smolvm.ExitStatus{Code: 128 + wire.SignalNumber(message.Name), Signal: message.Name}
			}
		}
		if request.WantReply {
			_ = request.Reply(false, nil)
		}
	}
	return status, err
}
