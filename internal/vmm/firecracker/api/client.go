// Package api is a client of Firecracker's API, which is HTTP over a unix socket.
//
// It speaks to every release from [Oldest] on. What a release can do is decided by the version
// that [Client.Version] asks for: a request with something newer is refused here, in words,
// before it is sent; see [Feature]. Every call ends with its context, takes an answer of
// bounded length only, and quotes what Firecracker says of a request that it refuses; see
// [Fault].
package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// maxAnswer bounds an answer, in bytes. The largest that there is, of a whole VM's
// configuration, has a few thousand.
const maxAnswer = 256 << 10

// Client speaks to one Firecracker. Its methods may be called from any goroutine; Firecracker
// answers one request after the other.
type Client struct {
	http      http.Client
	transport *http.Transport

	mu      sync.Mutex // guards the following
	version Version    // zero before Firecracker was asked
	conns   map[*tracked]struct{}
	closed  bool
}

// tracked is a connection that the client knows of until it is closed. Package http closes one
// whose other end is gone at some time after that.
type tracked struct {
	net.Conn
	client *Client
}

// Close implements [net.Conn].
func (t *tracked) Close() error {
	t.client.mu.Lock()
	delete(t.client.conns, t)
	t.client.mu.Unlock()
	return t.Conn.Close()
}

// New returns a client of the Firecracker that dial connects to. It is to be closed.
func New(dial func(ctx context.Context) (net.Conn, error)) *Client {
	c := &Client{conns: map[*tracked]struct{}{}}
	c.transport = &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx, dial) },
		DisableCompression:     true,
		MaxIdleConnsPerHost:    1,
		MaxResponseHeaderBytes: maxAnswer,
	}
	c.http = http.Client{Transport: c.transport}
	return c
}

func (c *Client) dial(ctx context.Context, dial func(ctx context.Context) (net.Conn, error)) (net.Conn, error) {
	conn, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.Join(net.ErrClosed, conn.Close())
	}
	t := &tracked{conn, c}
	c.conns[t] = struct{}{}
	return t, nil
}

// Close closes the connection, which ends calls that wait.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	open := slices.Collect(maps.Keys(c.conns))
	c.mu.Unlock()
	for _, conn := range open {
		_ = conn.Close()
	}
	c.transport.CloseIdleConnections()
}

// Fault is what Firecracker says of a request that it refuses.
type Fault struct {
	// Call is the request, as in "PUT /boot-source".
	Call string
	// Status is that of HTTP.
	Status int
	// Message is Firecracker's fault_message, without line breaks.
	Message string
}

func (f *Fault) Error() string {
	return fmt.Sprintf("Firecracker refuses %s: %s", f.Call, f.Message)
}

// maxMessage bounds how much of Firecracker's words is quoted, in bytes.
const maxMessage = 2 << 10

// get sends a request without a body, and reads the answer into out.
func (c *Client) get(ctx context.Context, path string, out any) error {
	return c.do(ctx, http.MethodGet, path, nil, out)
}

// put sends a request that is answered by nothing.
func (c *Client) put(ctx context.Context, path string, in any) error {
	return c.do(ctx, http.MethodPut, path, in, nil)
}

// patch sends a request that is answered by nothing.
func (c *Client) patch(ctx context.Context, path string, in any) error {
	return c.do(ctx, http.MethodPatch, path, in, nil)
}

// do sends a request, and reads its answer into out unless that is nil. The error names the
// call.
func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	call := method + " " + path
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("%s: %w", call, err)
		}
		body = bytes.NewReader(text)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, body)
	if err != nil {
		return fmt.Errorf("%s: %w", call, err)
	}
	request.Header.Set("Accept", "application/json")
	if in != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := c.http.Do(request)
	if err != nil {
		return broken(ctx, call, err)
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	switch {
	case err != nil:
		return broken(ctx, call, err)
	case len(text) > maxAnswer:
		return fmt.Errorf("%s: Firecracker's answer is longer than %d bytes", call, maxAnswer)
	case response.StatusCode >= http.StatusBadRequest:
		return fault(call, response.StatusCode, text)
	case response.StatusCode >= http.StatusMultipleChoices:
		return fmt.Errorf("%s: Firecracker answers with status %d, which is none of its API", call, response.StatusCode)
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("%s: Firecracker's answer can't be read: %w", call, err)
	}
	return nil
}

// ErrBroken is the error of a call whose connection has ended, as it does when Firecracker ends.
var ErrBroken = errors.New("the connection to Firecracker is broken")

// broken is the error of a call whose connection did not last.
func broken(ctx context.Context, call string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: no answer from Firecracker: %w", call, context.Cause(ctx))
	}
	// What package http adds names the call a second time, by an address that is none.
	if inner := errors.Unwrap(err); inner != nil {
		err = inner
	}
	return fmt.Errorf("%s: %w: %w", call, ErrBroken, err)
}

// fault returns what an answer says that is an error.
func fault(call string, status int, text []byte) error {
	var answer struct {
		Message string `json:"fault_message"`
	}
	if err := json.Unmarshal(text, &answer); err != nil || answer.Message == "" {
		answer.Message = fmt.Sprintf("status %d, %s", status, strings.TrimSpace(string(text)))
	}
	message := strings.Join(strings.Fields(answer.Message), " ")
	if len(message) > maxMessage {
		message = message[:maxMessage] + "..."
	}
	return &Fault{Call: call, Status: status, Message: strings.ToValidUTF8(message, "?")}
}
