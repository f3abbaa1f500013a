package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
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
// way at once.
type Client struct {
	client *ssh.Client
	done   chan struct{}
}

// Dial connects and logs in.
func Dial(ctx context.Context, config ClientConfig) (*Client, error) {
	conn, err := config.Dial(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	sshConn, channels, requests, err := ssh.NewClientConn(conn, "smolvm", &ssh.ClientConfig{
		Config:            algorithms(),
		User:              config.User,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(config.Signer)},
		HostKeyCallback:   ssh.FixedHostKey(config.HostKey),
		HostKeyAlgorithms: []string{config.HostKey.Type()},
	})
	if !stop() {
		err = context.Cause(ctx)
		if sshConn != nil {
			_ = sshConn.Close()
		}
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("log in to the guest: %w", err)
	}
	c := &Client{client: ssh.NewClient(sshConn, channels, requests), done: make(chan struct{})}
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

// Close ends the connection, and with it what runs over it.
func (c *Client) Close() error {
	err := c.client.Close()
	<-c.done
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// Dial connects to an address as the guest sees it: "tcp" or "unix".
func (c *Client) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return c.client.DialContext(ctx, network, address)
}

// CopyTo copies a file or a tree into the guest.
func (c *Client) CopyTo(ctx context.Context, hostPath, guestPath string) error {
	name, err := filepath.Abs(hostPath)
	if err != nil {
		return err
	}
	request := wire.TarRequest{Extract: true, Path: guestPath, Name: filepath.Base(name)}
	return c.transfer(ctx, request, func(channel ssh.Channel) error {
		if err := tree.Write(channel, hostPath); err != nil {
			return err
		}
		return channel.CloseWrite()
	})
}

// CopyFrom copies a file or a tree of the guest to the host.
func (c *Client) CopyFrom(ctx context.Context, guestPath, hostPath string) error {
	target := tree.Target{Path: hostPath, Name: filepath.Base(guestPath)}
	return c.transfer(ctx, wire.TarRequest{Path: guestPath}, func(channel ssh.Channel) error {
		return tree.Extract(channel, target)
	})
}

// transfer runs one copy. If the stream ends too soon, what the guest says of the
// reason comes before what we noticed of it.
func (c *Client) transfer(ctx context.Context, request wire.TarRequest, run func(ssh.Channel) error) error {
	channel, requests, err := c.open(ctx, wire.TarChannel, request)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = channel.Close() })
	defer stop()
	complaint := make(chan string, 1)
	go func() {
		text, _ := io.ReadAll(io.LimitReader(channel.Stderr(), 4<<10))
		complaint <- strings.TrimSpace(string(text))
	}()
	copyErr := run(channel)
	if copyErr != nil && !cutOff(copyErr) {
		_ = channel.Close() // the failure is ours; the guest would go on
	}
	status, statusErr := exitStatus(requests)
	_ = channel.Close()
	said := <-complaint
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case copyErr != nil && !cutOff(copyErr):
		return copyErr
	case said != "":
		return errors.New("guest: " + said)
	case copyErr != nil:
		return copyErr
	case statusErr != nil:
		return statusErr
	case !status.Success():
		return fmt.Errorf("guest: copy ended with %s", status)
	}
	return nil
}

// cutOff says whether an error of a copy is that the other side went away.
func cutOff(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// open opens a channel of ours. An SSH library call can't be cancelled, so when ctx
// is done first, the channel is closed when it opens.
func (c *Client) open(ctx context.Context, kind string, request any) (ssh.Channel, <-chan *ssh.Request, error) {
	payload, err := json.Marshal(request)
	if err != nil {
		return nil, nil, err
	}
	type opened struct {
		channel  ssh.Channel
		requests <-chan *ssh.Request
		err      error
	}
	result := make(chan opened, 1)
	go func() {
		channel, requests, err := c.client.OpenChannel(kind, payload)
		result <- opened{channel, requests, err}
	}()
	select {
	case o := <-result:
		if o.err != nil {
			return nil, nil, describeOpen(o.err)
		}
		return o.channel, o.requests, nil
	case <-ctx.Done():
		go func() {
			if o := <-result; o.err == nil {
				go ssh.DiscardRequests(o.requests)
				_ = o.channel.Close()
			}
		}()
		return nil, nil, context.Cause(ctx)
	}
}

// describeOpen gives the agent's own words, without SSH's around them.
func describeOpen(err error) error {
	if refused, ok := errors.AsType[*ssh.OpenChannelError](err); ok {
		return errors.New("guest: " + refused.Message)
	}
	return fmt.Errorf("connection to the guest: %w", err)
}
