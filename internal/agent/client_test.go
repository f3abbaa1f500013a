package agent_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/guest"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/testenv"
)

// testGuest is the agent's SSH server, here on the host, behind connections that can be
// held as those of a paused guest are.
type testGuest struct {
	mu    sync.Mutex
	held  *sync.Cond
	stuck bool
}

func (g *testGuest) setHeld(held bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stuck = held
	g.held.Broadcast()
}

// pass copies from one end to the other, but not while the guest is held.
func (g *testGuest) pass(to, from *net.UnixConn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		g.mu.Lock()
		for g.stuck {
			g.held.Wait()
		}
		g.mu.Unlock()
		if err == nil {
			_, err = to.Write(buf[:n])
		}
		if err != nil {
			_, _ = to.Close(), from.Close()
			return
		}
	}
}

// newGuest starts a guest, and makes a client of it.
func newGuest(t *testing.T) (*testGuest, *agent.Client) {
	t.Helper()
	return newGuestOf(t, (*guest.Server).ServeTrusted)
}

// newGuestOf is newGuest with a guest that serves connections in a way of its own.
func newGuestOf(t *testing.T, serve func(*guest.Server, net.Conn)) (*testGuest, *agent.Client) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	server := guest.NewServer()
	if err := server.SetIdentity(wire.Hello{HostKey: key, AuthorizedKeys: [][]byte{signer.PublicKey().Marshal()}}); err != nil {
		t.Fatal(err)
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	g := &testGuest{}
	g.held = sync.NewCond(&g.mu)
	t.Cleanup(func() { g.setHeld(false) })
	client := agent.NewClient(agent.ClientConfig{
		Dial: func(context.Context) (net.Conn, error) {
			ours, outer := testenv.UnixPair(t)
			inner, theirs := testenv.UnixPair(t)
			go g.pass(outer, inner)
			go g.pass(inner, outer)
			go serve(server, theirs)
			return ours, nil
		},
		User: me.Username, Signer: signer, HostKey: signer.PublicKey(),
	})
	t.Cleanup(func() { _ = client.Close() })
	return g, client
}

// run runs a command that must be possible to run.
func run(t *testing.T, client *agent.Client, command smolvm.Command) (stdout, stderr string, status smolvm.ExitStatus) {
	t.Helper()
	var out, errs bytes.Buffer
	command.Stdout, command.Stderr = &out, &errs
	status, err := client.Exec(t.Context(), command)
	if err != nil {
		t.Errorf("%.100q: %v", command.Args, err)
	}
	return out.String(), errs.String(), status
}

// A call to a guest that does not answer ends with its context, and others that are under
// way go on when the guest does (C1). So it is with an agent that speaks SSH only, whose one
// connection takes no further calls then.
func TestExecInAHeldGuest(t *testing.T) {
	t.Run("plain", func(t *testing.T) {
		g, client := newGuest(t)
		testHeld(t, g, client, true)
	})
	t.Run("SSH", func(t *testing.T) {
		g, client := newGuestOf(t, (*guest.Server).Serve)
		testHeld(t, g, client, false)
	})
}

func testHeld(t *testing.T, g *testGuest, client *agent.Client, usable bool) {
	t.Helper()
	ready, started := io.Pipe()
	type result struct {
		out string
		err error
	}
	other := make(chan result, 1)
	input, feed := io.Pipe()
	go func() {
		var out bytes.Buffer
		_, err := client.Exec(t.Context(), smolvm.Command{
			Args: []string{"sh", "-c", "echo up; cat"}, Stdin: input, Stdout: io.MultiWriter(&out, started),
		})
		other <- result{out.String(), err}
	}()
	if _, err := io.ReadFull(ready, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, ready) }()

	ctx, cancel := context.WithCancelCause(t.Context())
	running := make(chan error, 1)
	up, said := io.Pipe()
	go func() {
		_, err := client.Exec(ctx, smolvm.Command{Args: []string{"sh", "-c", "echo up; sleep 1000"}, Stdout: said})
		running <- err
	}()
	if _, err := io.ReadFull(up, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	g.setHeld(true)
	cause := errors.New("given up")
	cancel(cause)
	select {
	case err := <-running:
		if !errors.Is(err, cause) {
			t.Errorf("exec: %v, want %v", err, cause)
		}
	case <-time.After(patience):
		t.Fatal("exec waits for a guest that is held")
	}
	mustEnd(t, "another exec", func(ctx context.Context) error {
		_, err := client.Exec(ctx, smolvm.Command{Args: []string{"true"}})
		return err
	})
	mustEnd(t, "dial", func(ctx context.Context) error { _, err := client.Dial(ctx, "tcp", "127.0.0.1:1"); return err })
	mustEnd(t, "copy to", func(ctx context.Context) error {
		return client.CopyTo(ctx, os.Args[0], t.TempDir(), agent.CopyOptions{})
	})
	mustEnd(t, "copy from", func(ctx context.Context) error {
		return client.CopyFrom(ctx, "/etc/passwd", filepath.Join(t.TempDir(), "x"), agent.CopyOptions{})
	})
	if client.Usable() != usable {
		t.Errorf("usable, while the guest does not answer: %v", !usable)
	}
	g.setHeld(false)
	go func() {
		_, _ = io.WriteString(feed, "still here\n")
		_ = feed.Close()
	}()
	if got := <-other; got.err != nil || got.out != "up\nstill here\n" {
		t.Errorf("the other command: %q, %v", got.out, got.err)
	}
	if usable {
		run(t, client, smolvm.Command{Args: []string{"true"}})
		return
	}
	select {
	case <-client.Done():
	case <-time.After(patience):
		t.Error("the connection is kept when its last call has ended")
	}
}

// A guest is ready once it has been asked, whatever its agent speaks; one that is another is
// not.
func TestReady(t *testing.T) {
	for name, serve := range map[string]func(*guest.Server, net.Conn){"plain": (*guest.Server).ServeTrusted, "SSH": (*guest.Server).Serve} {
		t.Run(name, func(t *testing.T) {
			_, client := newGuestOf(t, serve)
			if err := client.Ready(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	_, client := newGuestOf(t, func(s *guest.Server, conn net.Conn) {
		_, other, err := ed25519.GenerateKey(nil)
		if err == nil {
			err = s.SetIdentity(wire.Hello{HostKey: other})
		}
		if err != nil {
			t.Error(err)
		}
		s.ServeTrusted(conn)
	})
	if err := client.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "not the guest that was meant") {
		t.Errorf("of another guest: %v", err)
	}
}

// Readers and writers that block keep nobody waiting: not when the command has ended, nor
// when the context is done.
func TestExecWithStreamsThatBlock(t *testing.T) {
	_, client := newGuest(t)
	never, _ := io.Pipe()
	if out, _, status := run(t, client, smolvm.Command{Args: []string{"echo", "done"}, Stdin: never}); out != "done\n" || !status.Success() {
		t.Errorf("with a reader that blocks: %q, %v", out, status)
	}
	_, blocked := io.Pipe()
	mustEnd(t, "exec with a writer that blocks", func(ctx context.Context) error {
		_, err := client.Exec(ctx, smolvm.Command{Args: []string{"echo", "done"}, Stdout: blocked})
		return err
	})
	mustEnd(t, "exec with a reader that blocks", func(ctx context.Context) error {
		_, err := client.Exec(ctx, smolvm.Command{Args: []string{"cat"}, Stdin: never})
		return err
	})
	// When Exec has returned, its writers are the caller's again: the race detector sees
	// to that.
	var out bytes.Buffer
	mustEnd(t, "exec of what writes all the time", func(ctx context.Context) error {
		_, err := client.Exec(ctx, smolvm.Command{Args: []string{"yes"}, Stdout: &out})
		return err
	})
	_ = out.String()
	if !client.Usable() {
		t.Error("the guest has answered, and the connection takes no more calls")
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("no more room") }

// A command whose output nobody takes any more gets SIGPIPE.
func TestExecOutputFails(t *testing.T) {
	_, client := newGuest(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	status, err := client.Exec(ctx, smolvm.Command{Args: []string{"yes"}, Stdout: failingWriter{}})
	if status.Signal != "PIPE" || err == nil || !strings.Contains(err.Error(), "no more room") {
		t.Errorf("got %v, %v", status, err)
	}
}

// Commands up to the kernel's limits run; what is above is said, and nobody else on the
// connection notices (case 2).
func TestExecLongCommands(t *testing.T) {
	_, client := newGuest(t)
	input, feed := io.Pipe()
	other := make(chan string, 1)
	go func() {
		out, _, _ := run(t, client, smolvm.Command{Args: []string{"cat"}, Stdin: input})
		other <- out
	}()
	_, _ = io.WriteString(feed, "before ")
	args := func(n, size int) []string {
		list := []string{"sh", "-c", `echo $# ${#1}`, "sh"}
		for range n {
			list = append(list, strings.Repeat("x", size))
		}
		return list
	}
	const maxString = 128<<10 - 1 // MAX_ARG_STRLEN of the kernel, less the NUL
	for name, test := range map[string]struct {
		args   []string
		env    []string
		out    string
		status int
	}{
		"many":              {args: args(30_000, 20), out: "30000 20\n"},
		"a long one":        {args: args(1, maxString), out: fmt.Sprintln(1, maxString)},
		"most there can be": {args: args(15, maxString-1000), out: fmt.Sprintln(15, maxString-1000)},
		"long environment":  {args: []string{"sh", "-c", "echo ${#LONG}"}, env: []string{"LONG=" + strings.Repeat("y", 100_000), "B=" + strings.Repeat("z", 100_000)}, out: "100000\n"},
		"what JSON doubles": {args: []string{"sh", "-c", "echo ${#1}", "sh", strings.Repeat("<\x01", 50_000)}, out: "100000\n"},
		"one too long":      {args: args(1, maxString+1), status: 126},
		"too many":          {args: args(200, 100_000), status: 126},
		"far too many":      {args: args(1000, 100_000), status: 126},
	} {
		out, errs, status := run(t, client, smolvm.Command{Args: test.args, Env: test.env})
		if out != test.out || status.Code != test.status || (status.Code != 0) != strings.Contains(errs, "argument list too long") {
			t.Errorf("%s: %.50q, %.100q, %v", name, out, errs, status)
		}
	}
	_, _ = io.WriteString(feed, "after")
	_ = feed.Close()
	if out := <-other; out != "before after" {
		t.Errorf("another command got %q", out)
	}
}

// Words are bytes: what goes in comes out, UTF-8 or not (case 4).
func TestExecBytes(t *testing.T) {
	_, client := newGuest(t)
	word := "\xff\xc3\x28\x80 \xe9\n<&>\u2028"
	dir := filepath.Join(t.TempDir(), "d\xff")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, command := range map[string]smolvm.Command{
		"argument":    {Args: []string{"printf", "%s", word}},
		"environment": {Args: []string{"sh", "-c", `printf %s "$E"`}, Env: []string{"E=" + word}},
		"terminal":    {Args: []string{"sh", "-c", `printf %s "$TERM" | od -An -c | grep -q 377 && printf %s "$E"`}, Env: []string{"E=" + word}, TTY: &smolvm.TTY{Term: "\xff"}},
	} {
		want := word
		if command.TTY != nil {
			want = strings.ReplaceAll(word, "\n", "\r\n")
		}
		if out, errs, _ := run(t, client, command); out != want {
			t.Errorf("%s: got %q, %q, want %q", name, out, errs, want)
		}
	}
	if out, _, _ := run(t, client, smolvm.Command{Args: []string{"pwd"}, Dir: dir}); out != dir+"\n" {
		t.Errorf("directory: got %q", out)
	}
	if _, errs, status := run(t, client, smolvm.Command{Args: []string{"no-such-\xff"}}); status.Code != 127 || !strings.Contains(errs, "not found") {
		t.Errorf("no such command: %q, %v", errs, status)
	}
}

// The end of the input is the end of what a terminal's program reads, as if it had been
// typed.
func TestTerminalInputEnds(t *testing.T) {
	_, client := newGuest(t)
	for _, text := range []string{"", "line\n", "begun"} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		var out bytes.Buffer
		command := smolvm.Command{Args: []string{"sh", "-c", "stty -echo; echo; cat"}, Stdin: strings.NewReader(text), Stdout: &out, TTY: &smolvm.TTY{}}
		if text == "" {
			command.Stdin = nil
		}
		status, err := client.Exec(ctx, command)
		cancel()
		if err != nil || !status.Success() || !strings.HasSuffix(out.String(), strings.ReplaceAll(text, "\n", "\r\n")) {
			t.Errorf("of %q came %q, %v, %v", text, out.String(), status, err)
		}
	}
}

// echoServer sends back what it gets, and ends when its client has ended.
func echoServer(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			}()
		}
	}()
	return listener.Addr().String()
}

func isDeadline(err error) bool {
	var timeout net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) && errors.As(err, &timeout) && timeout.Timeout()
}

// A connection into the guest has deadlines, and its ends close one by one (case 27).
func TestDialDeadlines(t *testing.T) {
	_, client := newGuest(t)
	conn, err := client.Dial(t.Context(), "tcp", echoServer(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !isDeadline(err) {
		t.Errorf("read after its deadline: %v", err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	sent := bytes.Repeat([]byte("0123456789"), 100_000)
	go func() {
		_, _ = conn.Write(sent)
		_ = conn.(interface{ CloseWrite() error }).CloseWrite()
	}()
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("of %d bytes came back %d: %v", len(sent), len(got), err)
	}
	if conn.RemoteAddr().Network() != "tcp" || conn.Close() != nil || !errors.Is(conn.Close(), net.ErrClosed) {
		t.Error("it does not close as a connection does")
	}
	if _, err := conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write to what is closed: %v", err)
	}
	// A server that does not read.
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	if conn, err = client.Dial(t.Context(), "unix", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	if n, err := conn.Write(make([]byte, 32<<20)); !isDeadline(err) {
		t.Errorf("wrote %d bytes to who does not read: %v", n, err)
	}
	began := time.Now()
	if _ = conn.Close(); time.Since(began) > 5*time.Second {
		t.Error("Close waits for who does not read")
	}
	if _, err := client.Dial(t.Context(), "tcp", "127.0.0.1:1"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("connect to a closed port: %v", err)
	}
}

// The timeouts of net/http work over a connection into the guest.
func TestDialHTTP(t *testing.T) {
	_, client := newGuest(t)
	release := make(chan struct{})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			<-release
		}
		_, _ = io.WriteString(w, "hello")
	})}
	go func() { _ = server.Serve(listener) }()
	defer func() { _ = server.Close() }()
	defer close(release)
	web := &http.Client{Timeout: 300 * time.Millisecond, Transport: &http.Transport{DialContext: client.Dial}}
	ask := func(path string) (string, error) {
		response, err := web.Get("http://" + listener.Addr().String() + path)
		if err != nil {
			return "", err
		}
		defer func() { _ = response.Body.Close() }()
		text, err := io.ReadAll(response.Body)
		return string(text), err
	}
	if text, err := ask("/"); err != nil || text != "hello" {
		t.Errorf("got %q, %v", text, err)
	}
	var timeout net.Error
	if _, err := ask("/slow"); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("a slow page: %v", err)
	}
	// The other way: net/http's server sets deadlines on what it reads.
	conn, err := client.Dial(t.Context(), "tcp", echoServer(t))
	if err != nil {
		t.Fatal(err)
	}
	silent := &http.Server{ReadHeaderTimeout: 50 * time.Millisecond}
	served := make(chan struct{})
	silent.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			close(served)
		}
	}
	go func() { _ = silent.Serve(&oneConn{conn: conn, done: served}) }()
	select {
	case <-served:
	case <-time.After(patience):
		t.Error("a server waits for a request without end")
	}
	if _, err := conn.Write([]byte("x")); err == nil {
		t.Error("the connection is open")
	}
	_ = silent.Close()
}

// oneConn is a listener with one connection.
type oneConn struct {
	conn net.Conn
	done chan struct{}
	once sync.Once
}

func (l *oneConn) Accept() (conn net.Conn, err error) {
	l.once.Do(func() { conn = l.conn })
	if conn == nil {
		<-l.done
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// What a lying guest says of a command's end is bounded (C7).
func TestLyingGuest(t *testing.T) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	config := &ssh.ServerConfig{NoClientAuth: true}
	config.AddHostKey(signer)
	serve := func(conn net.Conn) {
		_, channels, requests, err := ssh.NewServerConn(conn, config)
		if err != nil {
			return
		}
		go ssh.DiscardRequests(requests)
		n := 0
		for newChannel := range channels {
			if n++; n == 3 {
				_ = newChannel.Reject(ssh.ConnectionFailed, strings.Repeat("\x1b[2J", 10_000))
				continue
			}
			channel, _, err := newChannel.Accept()
			if err != nil {
				return
			}
			if n == 1 {
				_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{1 << 31}))
			} else {
				_, _ = channel.SendRequest("exit-signal", false, ssh.Marshal(struct {
					Name string
					Core bool
					M, L string
				}{Name: strings.Repeat("\a", 10_000)}))
			}
			_ = channel.Close()
		}
	}
	client := agent.NewClient(agent.ClientConfig{
		Dial: func(context.Context) (net.Conn, error) {
			ours, theirs := testenv.UnixPair(t)
			go serve(theirs)
			return ours, nil
		},
		User: "root", Signer: signer, HostKey: signer.PublicKey(),
	})
	defer func() { _ = client.Close() }()
	status, err := client.Exec(t.Context(), smolvm.Command{Args: []string{"true"}})
	if err != nil || status.Code != 255 {
		t.Errorf("a huge status: %v, %v", status, err)
	}
	for _, what := range []string{"signal", "refusal"} {
		status, err := client.Exec(t.Context(), smolvm.Command{Args: []string{"true"}})
		if err == nil || len(err.Error()) > 5_000 || strings.ContainsAny(err.Error(), "\a\x1b") || len(status.Signal) > 20 {
			t.Errorf("a strange %s: %v, %.300v", what, status, err)
		}
	}
}
