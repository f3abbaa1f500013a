package firecracker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/api"
)

// channel is the host's end of a connection to the guest's port.
type channel struct {
	net.Conn
	lost func() // called once, when nothing more comes of it
	once sync.Once
}

// Read implements [vmm.Channel].
func (c *channel) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.note(err)
	return n, err
}

// Write implements [vmm.Channel].
func (c *channel) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.note(err)
	return n, err
}

// note takes a connection that has failed for lost. One whose deadline has passed has not.
func (c *channel) note(err error) {
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.once.Do(c.lost)
	}
}

// Close implements [vmm.Channel].
func (c *channel) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.lost)
	return err
}

// OpenChannel implements [vmm.Instance]. It returns when the guest has taken the connection.
func (i *instance) OpenChannel(ctx context.Context) (vmm.Channel, error) {
	c, err := i.openChannel(ctx)
	if err != nil {
		return nil, fmt.Errorf("open the guest channel of VM %q: %w", i.cfg.ID, err)
	}
	return c, nil
}

func (i *instance) openChannel(ctx context.Context) (*channel, error) {
	if !i.cfg.Channel {
		return nil, fmt.Errorf("%w: the VM was started without one", smolvm.ErrUnsupported)
	}
	if err := i.reserveChannel(ctx); err != nil {
		return nil, err
	}
	conn, err := i.connect(ctx)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.opening = false
	if err != nil {
		return nil, err
	}
	c := &channel{Conn: conn}
	c.lost = func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		if i.channel == c {
			i.channel = nil
		}
	}
	i.channel = c
	return c, nil
}

func (i *instance) reserveChannel(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case i.ended():
		return errEnded
	case i.channel != nil || i.opening:
		return vmm.ErrChannelTaken
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	i.opening = true
	return nil
}

// resetChannel ends the channel, as a saving does.
func (i *instance) resetChannel() {
	i.mu.Lock()
	c := i.channel
	i.reset = true
	i.mu.Unlock()
	if c != nil {
		_ = c.Close()
	}
}

// A connection is refused until the guest listens: Firecracker closes it then. Nothing tells
// of the moment when it does, so it is tried again after a while that grows. A guest whose
// driver is not there yet refuses nothing: the first attempt waits for it.
const (
	firstRetry = time.Millisecond
	lastRetry  = 20 * time.Millisecond
	// attemptTime bounds one attempt. Firecracker forgets a connection that the guest has not
	// answered, without a word, if it was saved or restored meanwhile.
	attemptTime = 2 * time.Second
)

// connect connects to the port on which the guest's agent listens. Where a connection can be
// broken by the guest's learning that earlier ones are gone, one is made for that, and another
// one returned: the guest answers the first when it knows, as Linux does both in the order in
// which they have come.
func (i *instance) connect(ctx context.Context) (net.Conn, error) {
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		conn, err := i.attempt(ctx)
		if err == nil && !i.takeReset() {
			return conn, nil
		}
		if err == nil {
			_ = conn.Close()
			continue
		}
		select {
		case <-time.After(wait):
		case <-i.done:
			return nil, errEnded
		case <-ctx.Done():
			return nil, fmt.Errorf("the guest does not listen: %w", context.Cause(ctx))
		}
	}
}

// takeReset reports whether a connection is to be given up that the guest's reset may break.
func (i *instance) takeReset() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	reset := i.reset && api.ResetBreaksNewVsock(i.version)
	i.reset = false
	return reset
}

// attempt connects once; see Firecracker's docs/vsock.md.
func (i *instance) attempt(ctx context.Context) (_ net.Conn, err error) {
	conn, err := i.dir.dial(ctx, nameVsock)
	if err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeout(ctx, attemptTime)
	stop := context.AfterFunc(bounded, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		// Unless it is stopped in time, a deadline may be set at any moment.
		if stopped := stop(); err == nil && !stopped {
			err = context.DeadlineExceeded
		}
		cancel()
		if err != nil {
			_ = conn.Close()
		}
	}()
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", vmm.ChannelVsockPort); err != nil {
		return nil, err
	}
	answer, err := readLine(conn)
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(answer, "OK ") {
		return nil, fmt.Errorf("Firecracker answers %.20q", answer) //nolint:staticcheck // its name
	}
	return conn, nil
}

// readLine reads a line and nothing beyond, which is the guest's.
func readLine(conn net.Conn) (string, error) {
	const most = 32
	var line []byte
	for one := make([]byte, 1); len(line) < most; {
		if _, err := conn.Read(one); err != nil {
			return "", err
		}
		if one[0] == '\n' {
			return string(line), nil
		}
		line = append(line, one[0])
	}
	return "", fmt.Errorf("Firecracker answers %q without an end", line) //nolint:staticcheck // its name
}

// ResetsChannel implements [vmm.ChannelResetter]: Firecracker resets all of vsock.
func (i *instance) ResetsChannel() bool { return i.cfg.Channel }
