package guest

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	hostagent "github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/testenv"
)

// testTime bounds what a test waits for.
const testTime = 30 * time.Second

// dialed is a listener whose connections a test makes.
type dialed chan net.Conn

func (d dialed) accept() (deadlineConn, error) {
	conn, ok := <-d
	if !ok {
		return nil, io.EOF
	}
	return conn, nil
}

// dial returns the host's end of a new connection.
func (d dialed) dial(t *testing.T) net.Conn {
	t.Helper()
	ours, theirs := testenv.UnixPair(t)
	d <- theirs
	return ours
}

// testHost is the host of an agent that serves an endpoint in this process, and makes nothing
// else of a hello than its SSH server's identity.
type testHost struct {
	hello  wire.Hello
	signer ssh.Signer
	hellos []string // the hostnames that the guest was given
	served chan error
}

func serveTest(t *testing.T, host endpoint) *testHost {
	t.Helper()
	signer, key := newKey(t)
	h := &testHost{hello: wire.Hello{Hostname: "web", HostKey: key, Time: time.Now()}, signer: signer, served: make(chan error, 1)}
	a := &agent{version: "test", first: true, reaper: newReaper(false)}
	a.takeOn = func(hello wire.Hello) (wire.Identity, []string, error) {
		h.hellos = append(h.hellos, hello.Hostname)
		return wire.Identity{Hostname: hello.Hostname, HostKey: ssh.FingerprintSHA256(signer.PublicKey())}, nil, a.server.SetIdentity(hello)
	}
	go func() { h.served <- a.serve(host, nil) }()
	return h
}

// open opens the channel over a connection, and returns a client too.
func (h *testHost) open(t *testing.T, conn net.Conn) (*hostagent.Link, *hostagent.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTime)
	defer cancel()
	link, answer, err := hostagent.Handshake(ctx, conn, h.hello)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = link.Close() })
	if answer.Identity.Hostname != h.hello.Hostname {
		t.Errorf("the guest is %q now", answer.Identity.Hostname)
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	client := hostagent.NewClient(hostagent.ClientConfig{Dial: link.Open, User: me.Username, Signer: h.signer, HostKey: h.signer.PublicKey()})
	t.Cleanup(func() { _ = client.Close() })
	return link, client
}

// say runs a command in the guest, which has to work.
func say(t *testing.T, client *hostagent.Client) {
	t.Helper()
	var out strings.Builder
	status, err := client.Exec(t.Context(), smolvm.Command{Args: []string{"echo", "hello"}, Stdout: &out})
	if err != nil || !status.Success() || out.String() != "hello\n" {
		t.Errorf("got %q, %s, %v", out.String(), status, err)
	}
}

// startLasting starts a command that does not end by itself, and returns what waits for its end.
func startLasting(t *testing.T, client *hostagent.Client) (ended func(), result <-chan error) {
	t.Helper()
	reader, writer := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := client.Exec(context.Background(), smolvm.Command{Args: []string{"sh", "-c", "echo $$; exec sleep 1000"}, Stdout: writer})
		done <- err
		_ = writer.Close()
	}()
	line, err := bufio.NewReader(reader).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	start, err := proc.StartTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), testTime)
		defer cancel()
		if err := proc.Wait(ctx, pid, start); err != nil {
			t.Errorf("the command goes on: %v", err)
		}
	}, done
}

// An agent that is connected to serves the newest connection, whatever has become of the one
// before, and is the same guest over each. A session that ends takes the commands with it that
// were run over it.
func TestConnections(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, first net.Conn, link *hostagent.Link){
		"closed":       func(_ *testing.T, first net.Conn, _ *hostagent.Link) { _ = first.Close() },
		"still open":   func(*testing.T, net.Conn, *hostagent.Link) {},
		"session over": func(_ *testing.T, _ net.Conn, link *hostagent.Link) { _ = link.Close() },
		"released": func(t *testing.T, _ net.Conn, link *hostagent.Link) {
			if err := link.Release(t.Context()); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			listener := make(dialed)
			host := serveTest(t, listenOn(listener))
			first := listener.dial(t)
			link, client := host.open(t, first)
			say(t, client)
			ended, result := startLasting(t, client)
			change(t, first, link)
			second := listener.dial(t)
			_, client = host.open(t, second)
			ended()
			if err := <-result; err == nil {
				t.Error("the call whose session has ended was a success")
			}
			say(t, client)
			close(listener)
			_ = second.Close()
			if err := <-host.served; !errors.Is(err, io.EOF) {
				t.Errorf("the agent ended with %v", err)
			}
			if strings.Join(host.hellos, " ") != "web web" {
				t.Errorf("hellos: %q", host.hellos)
			}
		})
	}
}

// A connection that says nothing, or nonsense, does not keep the next from being served.
func TestSilentConnections(t *testing.T) {
	listener := make(dialed)
	host := serveTest(t, listenOn(listener))
	silent := listener.dial(t)
	for _, text := range []string{"", "nonsense", "SMOLVM 5\n", "SMOLVM 3\n{{{"} {
		if _, err := io.WriteString(listener.dial(t), text); err != nil {
			t.Fatal(err)
		}
	}
	_, client := host.open(t, listener.dial(t))
	say(t, client)
	if n, err := silent.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("the silent connection is open: %d, %v", n, err)
	}
	close(listener)
}

// A session that is broken off leaves the connection to the next one, on a port as on a connection,
// and ends the commands that were run over it.
func TestRelease(t *testing.T) {
	for name, newEnd := range map[string]func(t *testing.T) (net.Conn, endpoint){
		kindPort: func(t *testing.T) (net.Conn, endpoint) {
			ours, theirs := testenv.UnixPair(t)
			file, err := theirs.File()
			if err != nil {
				t.Fatal(err)
			}
			fd, err := unix.Dup(int(file.Fd()))
			if err == nil {
				err = unix.SetNonblock(fd, true)
			}
			if err != nil {
				t.Fatal(err)
			}
			_, _ = file.Close(), theirs.Close()
			device := os.NewFile(uintptr(fd), "port")
			t.Cleanup(func() { _ = device.Close() })
			return ours, &port{device}
		},
		kindVsock: func(t *testing.T) (net.Conn, endpoint) {
			listener := make(dialed)
			t.Cleanup(func() { close(listener) })
			end := listenOn(listener)
			return listener.dial(t), end
		},
	} {
		t.Run(name, func(t *testing.T) {
			conn, end := newEnd(t)
			host := serveTest(t, end)
			for range 2 {
				link, client := host.open(t, conn)
				say(t, client)
				ended, result := startLasting(t, client)
				if err := link.Release(t.Context()); err != nil {
					t.Fatal(err)
				}
				ended()
				if err := <-result; err == nil {
					t.Error("the call whose session was broken off was a success")
				}
			}
		})
	}
}

func TestParsePort(t *testing.T) {
	for text, want := range map[string]uint32{
		"1024": 1024, "1": 1, "4294967294": 4294967294,
		"": 0, "0": 0, "4294967295": 0, "99999999999999999999": 0, "-1": 0, "+1": 0, "0x400": 0, "1024,1025": 0, "port": 0,
		"\x1b[2J" + strings.Repeat("9", 1000): 0,
	} {
		got, err := parsePort(text)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%.30q is %d, %v", text, got, err)
		}
		if err != nil && (!strings.Contains(err.Error(), "smolvm.vsock=") || strings.Contains(err.Error(), "\x1b") || len(err.Error()) > 150) {
			t.Errorf("error is %q", err)
		}
	}
}

// The port listens as soon as it can, which is before the modules that follow are loaded.
func TestOpenVsock(t *testing.T) {
	const port = 0x5a01
	errModule := errors.New("no such module")
	listens := func() bool {
		file, err := listenVsock(port)
		if err == nil {
			_ = file.Close()
		}
		return errors.Is(err, unix.EADDRINUSE)
	}
	probe, err := listenVsock(port)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		if _, err := openVsock(port, []func() error{func() error { return nil }}); err == nil || !strings.Contains(err.Error(), "has the module vsock") {
			t.Errorf("without vsock: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = probe.Close()
	before := false
	file, err := openVsock(port, []func() error{func() error { before = listens(); return nil }})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openVsock(port, nil); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a port that is taken: %v", err)
	}
	if err := file.Close(); err != nil || !before {
		t.Errorf("it listened before the driver was loaded: %v (%v)", before, err)
	}
	if _, err := openVsock(port, []func() error{func() error { return errModule }}); !errors.Is(err, errModule) || listens() {
		t.Errorf("a module that can't be loaded: %v, and the port listens: %v", err, listens())
	}
}
