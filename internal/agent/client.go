package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/plain"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// ClientConfig says how to reach a guest's agent.
type ClientConfig struct {
	// Dial makes a connection to the agent, which has a method CloseWrite.
	Dial func(context.Context) (net.Conn, error)
	// User to log in as if that is needed; only root may run commands as somebody else.
	// Otherwise calls are made as root.
	User string
	// Lost, if not nil, is asked why a connection that was lost, over which a call went that
	// began then, has ended; nil is not known. It is waited for.
	Lost func(began time.Time) error
	// Signer is for logins; HostKey is the key that the guest must have.
	Signer  ssh.Signer
	HostKey ssh.PublicKey
}

// Client calls a guest's agent. Any number of calls may be under way at once, each over a
// connection of its own. Each of them returns when its context is done, whatever the guest
// does. With an agent of an earlier version, which speaks SSH only, they share one.
type Client struct {
	config   ClientConfig
	identity string // of the guest
	done     chan struct{}
	// closing is done when the client is closed; close does that.
	closing context.Context //nolint:containedctx // of the client, not of a call
	close   context.CancelFunc

	loggingIn chan struct{} // holds an element while somebody logs in

	mu      sync.Mutex
	ssh     *ssh.Client        // nil: the agent speaks more than SSH, as far as we know
	calls   map[*call]struct{} // under way
	closed  bool
	retired bool
}

// NewClient returns a client. It connects when it is used.
func NewClient(config ClientConfig) *Client {
	c := &Client{
		config: config, identity: ssh.FingerprintSHA256(config.HostKey),
		done: make(chan struct{}), loggingIn: make(chan struct{}, 1), calls: map[*call]struct{}{},
	}
	c.closing, c.close = context.WithCancel(context.Background())
	return c
}

// Ready returns when the guest answers, and has run a program since it was restored. An
// agent that speaks SSH only has seen to that before it answers anything.
func (c *Client) Ready(ctx context.Context) error {
	call, err := c.open(ctx, wire.ReadyChannel, nil)
	if err != nil && c.loggedIn() != nil {
		return nil // it does not know what it is asked for
	}
	if err != nil {
		return err
	}
	call.abandon()
	return nil
}

// openChannel opens a channel, by SSH if the agent can do no better. It may take longer
// than ctx.
func (c *Client) openChannel(ctx context.Context, kind string, payload []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.closing, func() { cancel(net.ErrClosed) })()
	if loggedIn := c.loggedIn(); loggedIn != nil {
		return loggedIn.OpenChannel(kind, payload)
	}
	channel, requests, err := c.openPlain(ctx, kind, payload)
	if !errors.Is(err, plain.ErrSSH) {
		return channel, requests, err
	}
	loggedIn, err := c.logIn(ctx)
	if err != nil {
		return nil, nil, err
	}
	return loggedIn.OpenChannel(kind, payload)
}

func (c *Client) openPlain(ctx context.Context, kind string, payload []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	dialed, err := c.config.Dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	conn, ok := dialed.(plain.Conn)
	if !ok {
		_ = dialed.Close()
		return nil, nil, fmt.Errorf("a connection of type %T has no halves", dialed)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	channel, requests, err := plain.Open(conn, c.identity, kind, payload)
	if !stop() && err != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, nil, err // of a type that says nothing of a nil channel
	}
	return channel, requests, nil
}

func (c *Client) loggedIn() *ssh.Client {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ssh
}

// logIn logs in by SSH, unless that was done.
func (c *Client) logIn(ctx context.Context) (*ssh.Client, error) {
	select {
	case c.loggingIn <- struct{}{}:
		defer func() { <-c.loggingIn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if loggedIn := c.loggedIn(); loggedIn != nil {
		return loggedIn, nil
	}
	conn, err := c.config.Dial(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // which ends the login
	sshConn, channels, requests, err := ssh.NewClientConn(conn, "smolvm", &ssh.ClientConfig{
		Config:            algorithms(),
		User:              c.config.User,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(c.config.Signer)},
		HostKeyCallback:   ssh.FixedHostKey(c.config.HostKey),
		HostKeyAlgorithms: []string{c.config.HostKey.Type()},
	})
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("log in to the guest: %w", err)
	}
	client := ssh.NewClient(sshConn, channels, requests)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		_ = client.Close()
		return nil, net.ErrClosed
	}
	c.ssh = client
	go func() {
		_ = client.Wait()
		close(c.done)
	}()
	return client, nil
}

// algorithms picks what costs an emulated CPU least. The connection does not leave
// the host, and its other end is not trusted anyway.
func algorithms() ssh.Config {
	return ssh.Config{
		KeyExchanges: []string{ssh.KeyExchangeCurve25519},
		Ciphers:      []string{ssh.CipherChaCha20Poly1305, ssh.CipherAES128GCM},
	}
}

// Done returns a channel that is closed when the client has been closed, or its SSH connection
// has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// answerTime is how long a guest may take to confirm that a call was given up. An emulated
// one on a busy host takes some tens of milliseconds.
const answerTime = 500 * time.Millisecond

// Close ends all calls.
func (c *Client) Close() error {
	c.mu.Lock()
	closed, client := c.closed, c.ssh
	c.closed = true
	c.close()
	calls := slices.Collect(maps.Keys(c.calls))
	c.mu.Unlock()
	for _, call := range calls {
		call.abort()
	}
	switch {
	case client == nil && !closed:
		close(c.done)
	case client != nil:
		_ = client.Close() // it has ended if that fails
		select {
		case <-c.done:
		case <-time.After(answerTime): // its end is not ours to wait for
		}
	}
	return nil
}

// Usable reports whether the client takes further calls: it has not been closed, and no
// guest that it has logged in to has failed to answer.
func (c *Client) Usable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.done:
		return false
	default:
		return !c.retired && !c.closed
	}
}

// retire ends the SSH connection when the calls that are under way have ended. A guest that
// does not confirm that a call is over would have the connection keep it for ever.
func (c *Client) retire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.retired = true
	c.closeIfLeft()
}

func (c *Client) closeIfLeft() {
	if client := c.ssh; c.retired && len(c.calls) == 0 && client != nil {
		go func() { _ = client.Close() }()
	}
}

// begin counts a call in.
func (c *Client) begin(k *call) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.calls[k] = struct{}{}
	return nil
}

// end counts a call out.
func (c *Client) end(k *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.calls, k)
	c.closeIfLeft()
}
