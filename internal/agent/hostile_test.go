package agent_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/testenv"
)

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

// handshake opens a channel to a guest that answers the hello, and does as it likes then.
func handshake(t *testing.T, then func(guest *net.UnixConn)) *agent.Link {
	t.Helper()
	host, guest := testenv.UnixPair(t)
	go func() {
		var hello wire.Hello
		if wire.Read(guest, &hello) == nil && wire.Write(guest, wire.Answer{Version: "hostile"}) == nil {
			then(guest)
		}
	}()
	link, answer, err := agent.Handshake(t.Context(), host, wire.Hello{Hostname: "host"})
	if err != nil || answer.Version != "hostile" {
		t.Fatalf("handshake: %+v, %v", answer, err)
	}
	t.Cleanup(func() { _ = link.Close() })
	return link
}

// muxFrame is the header of a frame of yamux's.
func muxFrame(kind byte, flags uint16, id, length uint32) []byte {
	b := make([]byte, 12)
	b[1] = kind
	binary.BigEndian.PutUint16(b[2:], flags)
	binary.BigEndian.PutUint32(b[4:], id)
	binary.BigEndian.PutUint32(b[8:], length)
	return b
}

// flood writes a frame again and again, and reads nothing.
func flood(guest io.Writer, next func(i uint32) []byte) {
	var block []byte
	for i := uint32(0); ; i++ {
		if block = append(block, next(i)...); len(block) < 60<<10 {
			continue
		}
		if _, err := guest.Write(block); err != nil {
			return
		}
		block = block[:0]
	}
}

// A guest that pings, opens streams or sends noise, and reads nothing, costs the host
// neither goroutines nor memory: its session ends (S3, S4).
func TestGuestCannotFlood(t *testing.T) {
	for name, test := range map[string]struct {
		next func(i uint32) []byte
		text string
	}{
		"pings":        {func(i uint32) []byte { return muxFrame(2, 1, 0, i) }, "it pings"},
		"streams":      {func(i uint32) []byte { return append(muxFrame(0, 1, 2*i+2, 4096), make([]byte, 4096)...) }, "it opens stream 2"},
		"noise":        {func(i uint32) []byte { return []byte{byte(i), 77} }, "frame of type 77"},
		"late answers": {func(uint32) []byte { return muxFrame(0, 0, 99, 0) }, "never opened"},
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			goroutines := runtime.NumGoroutine()
			link := handshake(t, func(guest *net.UnixConn) { flood(guest, test.next) })
			select {
			case <-link.Done():
			case <-time.After(patience):
				t.Error("the session goes on")
			}
			runtime.ReadMemStats(&after)
			if n := runtime.NumGoroutine() - goroutines; n > 20 {
				t.Errorf("%d goroutines were left behind", n)
			}
			if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 8<<20 {
				t.Errorf("the heap has grown by %d MiB", grown>>20)
			}
			if _, err := link.Open(t.Context()); !errors.Is(err, wire.ErrProtocol) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("what is said of it: %v, want %q", err, test.text)
			}
		})
	}
}

// fill makes a link wait for a guest that does not read.
func fill(t *testing.T, link *agent.Link) {
	t.Helper()
	conn, err := link.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 1<<20)
	for range 8 {
		if err := conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		full := make(chan error, 1)
		go func() {
			_, err := conn.Write(block)
			full <- err
		}()
		select {
		case err := <-full:
			if !errors.Is(err, os.ErrDeadlineExceeded) && err != nil && !isTimeout(err) {
				t.Fatal(err)
			}
		case <-time.After(time.Second):
			return
		}
		if conn, err = link.Open(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("the guest takes all that it is sent")
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// Whatever waits for a guest that does not read ends with its context (C2).
func TestCallsEndWithTheirContext(t *testing.T) {
	block := make(chan struct{})
	defer close(block)
	link := handshake(t, func(*net.UnixConn) { <-block })
	fill(t, link)
	mustEnd(t, "open", func(ctx context.Context) error { _, err := link.Open(ctx); return err })
	mustEnd(t, "shutdown", func(ctx context.Context) error { return link.Shutdown(ctx, time.Second, 0) })
	mustEnd(t, "sync", link.Sync)
	mustEnd(t, "clock", func(ctx context.Context) error { return link.SetClock(ctx, time.Now()) })
	mustEnd(t, "ping", link.Ping)
	mustEnd(t, "release", link.Release) // the last, as it ends the session
}

func mustEnd(t *testing.T, name string, call func(context.Context) error) {
	t.Helper()
	cause := errors.New("given up")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, cause)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- call(ctx) }()
	select {
	case err := <-ended:
		if !errors.Is(err, cause) {
			t.Errorf("%s: %v, want %v", name, err, cause)
		}
	case <-time.After(5 * time.Second):
		t.Errorf("%s has not returned", name)
	}
}

// An agent that is newer than this program is refused; one from before there were numbers is
// not.
func TestAgentsProtocol(t *testing.T) {
	for number, want := range map[int]error{0: nil, wire.Protocol: nil, wire.Protocol + 1: smolvm.ErrUnsupported} {
		host, guest := testenv.UnixPair(t)
		told := make(chan int, 1)
		go func() {
			var hello wire.Hello
			_ = wire.Read(guest, &hello)
			told <- hello.Protocol
			_ = wire.Write(guest, wire.Answer{Protocol: number})
		}()
		link, _, err := agent.Handshake(t.Context(), host, wire.Hello{})
		if !errors.Is(err, want) {
			t.Errorf("with number %d: %v", number, err)
		}
		if got := <-told; got != wire.Protocol {
			t.Errorf("the guest is told %d", got)
		}
		if link != nil {
			_ = link.Close()
		}
	}
}

// A guest that answers the hello with noise, or again and again, is not waited for
// longer than its noise lasts.
func TestGuestThatNeverAnswersHello(t *testing.T) {
	for name, say := range map[string]func(io.Writer) error{
		"noise":         func(w io.Writer) error { _, err := w.Write(make([]byte, 64<<10)); return err },
		"other answers": func(w io.Writer) error { return wire.Write(w, wire.Answer{Again: true}) },
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := testenv.UnixPair(t)
			go func() {
				for say(guest) == nil {
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if _, _, err := agent.Handshake(ctx, host, wire.Hello{}); !errors.Is(err, wire.ErrProtocol) {
				t.Errorf("error is %v", err)
			}
		})
	}
}
