package shim

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/compat"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/stream"
)

// Client asks a running shim. Each call is a connection of its own. If there is no
// shim any more, the error matches [ErrGone].
type Client struct{ runtimeDir string }

// NewClient returns a client for the shim of that runtime directory.
func NewClient(runtimeDir string) *Client { return &Client{runtimeDir: runtimeDir} }

// Status asks for the VM's status.
func (c *Client) Status(ctx context.Context) (Status, error) {
	answer, err := c.call(ctx, Request{Op: OpStatus})
	if err != nil || answer.Status == nil {
		return Status{}, err
	}
	if err := compat.Check("what the VM's shim says", answer.Status.Protocol, Protocol); err != nil {
		return Status{}, err
	}
	return *answer.Status, nil
}

// Stop stops the VM within about the grace, and returns when it has ended. If ctx is done
// first, the stop goes on.
func (c *Client) Stop(ctx context.Context, how Stop) error {
	_, err := c.call(ctx, Request{Op: OpStop, Grace: how.Grace, Patient: how.Patient, Signal: how.Signal})
	return err
}

// AddForward sets up a port forward. Port 0 of the host is any free port; the
// forward that is returned names it. The error matches [smolvm.ErrPortInUse] if the
// port is taken.
func (c *Client) AddForward(ctx context.Context, forward Forward) (Forward, error) {
	answer, err := c.call(ctx, Request{Op: OpAddForward, Forward: forward})
	return answer.Forward, err
}

// RemoveForward ends the forward of a protocol and a host address, with its connections;
// its guest port does not matter. The error matches [smolvm.ErrNotFound] if there is none.
func (c *Client) RemoveForward(ctx context.Context, forward Forward) error {
	_, err := c.call(ctx, Request{Op: OpRemoveForward, Forward: forward})
	return err
}

// SetEgress puts an egress policy in force. Flows that it does not allow have ended when it
// returns. A shim that knows of no policies says so.
func (c *Client) SetEgress(ctx context.Context, egress network.Egress) error {
	_, err := c.call(ctx, Request{Op: OpSetEgress, Egress: &egress})
	return err
}

// Usage asks what the VM has taken of the host.
func (c *Client) Usage(ctx context.Context) (smolvm.Usage, error) {
	answer, err := c.call(ctx, Request{Op: OpUsage})
	if err != nil || answer.Usage == nil {
		return smolvm.Usage{}, err
	}
	return *answer.Usage, nil
}

// Pause holds the guest's CPUs.
func (c *Client) Pause(ctx context.Context) error {
	_, err := c.call(ctx, Request{Op: OpPause})
	return err
}

// Save saves the guest, which goes on meanwhile. See [vmm.Saver]; that the guest is
// paused already is fine. If ctx is done, it returns when the shim has given up, so that
// nothing happens to the files any more.
func (c *Client) Save(ctx context.Context, save Save) (Saved, error) {
	answer, err := c.call(ctx, Request{Op: OpSave, Save: &save})
	return answer.Saved, err
}

// Resume lets the guest's CPUs go on, and sets its clock.
func (c *Client) Resume(ctx context.Context) error {
	_, err := c.call(ctx, Request{Op: OpResume})
	return err
}

// DialGuest connects to a TCP port of the guest's network address.
func (c *Client) DialGuest(ctx context.Context, port int) (net.Conn, error) {
	conn, reader, _, err := c.send(ctx, Request{Op: OpDial, Port: port})
	if err != nil {
		return nil, err
	}
	return stream.Peeked{Conn: conn, Reader: reader}, nil
}

// DialAgent connects to the guest's agent.
func (c *Client) DialAgent(ctx context.Context) (net.Conn, error) {
	return dialUnix(ctx, AgentSocket(c.runtimeDir))
}

func (c *Client) call(ctx context.Context, asked Request) (Response, error) {
	conn, _, answer, err := c.send(ctx, asked)
	if err != nil {
		return answer, err
	}
	return answer, conn.Close()
}

// send sends a Request and reads the response. The connection is open if there is
// no error.
func (c *Client) send(ctx context.Context, asked Request) (net.Conn, *bufio.Reader, Response, error) {
	var answer Response
	conn, err := dialUnix(ctx, ControlSocket(c.runtimeDir))
	if err != nil {
		return nil, nil, answer, err
	}
	stop := context.AfterFunc(ctx, func() {
		if half, ok := conn.(interface{ CloseWrite() error }); ok && asked.Op == OpSave {
			_ = half.CloseWrite() // which the shim answers
			return
		}
		_ = conn.SetDeadline(time.Unix(1, 0))
	})
	reader := bufio.NewReader(conn)
	var line []byte
	if err = json.NewEncoder(conn).Encode(asked); err == nil {
		line, err = reader.ReadBytes('\n')
	}
	if err == nil {
		err = json.Unmarshal(line, &answer)
	}
	givenUp := !stop()
	switch {
	case givenUp && (asked.Op != OpSave || err != nil || answer.Failure != nil):
		err = context.Cause(ctx)
	case stream.IsBroken(err):
		err = fmt.Errorf("ask the VM's shim to %s: %w: %w", asked.Op, ErrGone, err)
	case err != nil:
		err = fmt.Errorf("ask the VM's shim to %s: %w", asked.Op, err)
	case answer.Failure != nil:
		err = answer.Failure.Err()
	}
	if err != nil {
		_ = conn.Close()
		return nil, nil, answer, err
	}
	return conn, reader, answer, nil
}
