package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/tree"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// ClientConfig says how to reach a guest's agent.
type ClientConfig struct {
	// Dial makes a connection to the agent's SSH server.
	Dial func(context.Context) (net.Conn, error)
	// User to log in as; only root may run commands as somebody else.
	User string
	// Signer proves who we are; HostKey is the key that the guest must have.
	Signer  ssh.Signer
	HostKey ssh.PublicKey
}

// Client is an SSH connection to a guest's agent. Any number of calls may be under
// way at once. Each of them returns when its context is done, whatever the guest does.
type Client struct {
	client *ssh.Client
	done   chan struct{}

	mu      sync.Mutex
	calls   int // under way
	retired bool
}

// Dial connects and logs in.
func Dial(ctx context.Context, config ClientConfig) (*Client, error) {
	conn, err := config.Dial(ctx)
	if err != nil {
		return nil, err
	}
	type login struct {
		client *ssh.Client
		err    error
	}
	result := make(chan login, 1)
	go func() {
		sshConn, channels, requests, err := ssh.NewClientConn(conn, "smolvm", &ssh.ClientConfig{
			Config:            algorithms(),
			User:              config.User,
			Auth:              []ssh.AuthMethod{ssh.PublicKeys(config.Signer)},
			HostKeyCallback:   ssh.FixedHostKey(config.HostKey),
			HostKeyAlgorithms: []string{config.HostKey.Type()},
		})
		if err != nil {
			result <- login{err: err}
			return
		}
		result <- login{client: ssh.NewClient(sshConn, channels, requests)}
	}()
	var got login
	select {
	case got = <-result:
	case <-ctx.Done():
		got.err = context.Cause(ctx) // closing ends the login
	}
	if got.err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("log in to the guest: %w", got.err)
	}
	c := &Client{client: got.client, done: make(chan struct{})}
	go func() {
		_ = c.client.Wait()
		close(c.done)
	}()
	return c, nil
}

// algorithms picks what costs an emulated CPU least. The connection does not leave
// the host, and its other end is not trusted anyway.
func algorithms() ssh.Config {
	return ssh.Config{
		KeyExchanges: []string{ssh.KeyExchangeCurve25519},
		Ciphers:      []string{ssh.CipherChaCha20Poly1305, ssh.CipherAES128GCM},
	}
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// answerTime is how long a guest may take to confirm that a call was given up. An emulated
// one on a busy host takes some tens of milliseconds.
const answerTime = 500 * time.Millisecond

// Close ends the connection, and with it what runs over it.
func (c *Client) Close() error {
	err := c.client.Close()
	select {
	case <-c.done:
	case <-time.After(answerTime): // its end is not ours to wait for
	}
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// Usable reports whether the connection takes further calls: it has not ended, and its
// guest has not failed to answer.
func (c *Client) Usable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.done:
		return false
	default:
		return !c.retired
	}
}

// retire ends the connection when the calls that are under way have ended. A guest that
// does not confirm that a call is over would have the connection keep it for ever.
func (c *Client) retire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.retired = true
	c.closeIfLeft()
}

func (c *Client) closeIfLeft() {
	if c.retired && c.calls == 0 {
		go func() { _ = c.client.Close() }()
	}
}

func (c *Client) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
}

func (c *Client) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls--
	c.closeIfLeft()
}

// CopyTo copies a file or a tree into the guest.
func (c *Client) CopyTo(ctx context.Context, hostPath, guestPath string) error {
	name, err := filepath.Abs(hostPath)
	if err != nil {
		return err
	}
	request := wire.TarRequest{Extract: true, Path: guestPath, Name: filepath.Base(name)}
	return c.transfer(ctx, request, func(channel *conn) error {
		if err := tree.Write(channel, hostPath); err != nil {
			return err
		}
		return channel.CloseWrite()
	})
}

// CopyFrom copies a file or a tree of the guest to the host.
func (c *Client) CopyFrom(ctx context.Context, guestPath, hostPath string) error {
	target := tree.Target{Path: hostPath, Name: filepath.Base(guestPath)}
	return c.transfer(ctx, wire.TarRequest{Path: guestPath}, func(channel *conn) error {
		return tree.Extract(channel, target)
	})
}

// transfer runs one copy. If the stream ends too soon, what the guest says of the
// reason comes before what we noticed of it. If ctx is done, the stream fails.
func (c *Client) transfer(ctx context.Context, request wire.TarRequest, run func(*conn) error) error {
	call, err := c.open(ctx, wire.TarChannel, mustJSON(request))
	if err != nil {
		return err
	}
	stream := newConn(call, guestAddr{})
	defer stream.cut()
	stop := context.AfterFunc(ctx, func() { _ = stream.SetDeadline(past) })
	defer stop()
	complaint := make(chan string, 1)
	go func() {
		text, _ := io.ReadAll(io.LimitReader(call.Stderr(), 4<<10))
		_, _ = io.Copy(io.Discard, call.Stderr())
		complaint <- wire.Text(strings.TrimSpace(string(text)), 1<<10)
	}()
	copied := make(chan error, 1)
	go func() { copied <- run(stream) }()
	var copyErr error
	select {
	case copyErr = <-copied:
	case <-ctx.Done():
		// It may be busy with a file of ours, but no longer than the guest may take.
		call.abandon()
		select {
		case <-copied:
		case <-time.After(answerTime):
		}
		return context.Cause(ctx)
	}
	if copyErr != nil && !cutOff(copyErr) {
		call.abandon() // the failure is ours; the guest would go on
		return copyErr
	}
	select {
	case <-call.over:
	case <-ctx.Done():
		call.abandon()
		return context.Cause(ctx)
	}
	said := <-complaint
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case said != "":
		return errors.New("guest: " + said)
	case copyErr != nil:
		return copyErr
	case call.err != nil:
		return call.err
	case !call.status.Success():
		return fmt.Errorf("guest: copy ended with %s", call.status)
	}
	return nil
}

// cutOff says whether an error of a copy is that the other side went away.
func cutOff(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.EPIPE)
}
