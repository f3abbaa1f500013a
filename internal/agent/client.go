package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
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
		var banner string // why the guest refuses
		sshConn, channels, requests, err := ssh.NewClientConn(conn, "smolvm", &ssh.ClientConfig{
			Config:            algorithms(),
			User:              config.User,
			Auth:              []ssh.AuthMethod{ssh.PublicKeys(config.Signer)},
			HostKeyCallback:   ssh.FixedHostKey(config.HostKey),
			HostKeyAlgorithms: []string{config.HostKey.Type()},
			BannerCallback: func(message string) error {
				banner = message[:min(len(message), maxBanner)]
				return nil
			},
		})
		if err != nil && banner != "" {
			err = fmt.Errorf("%w: the guest has said %q", err, banner)
		}
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

// maxBanner bounds in bytes what is shown of a guest's reason to refuse a login.
const maxBanner = 200

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
