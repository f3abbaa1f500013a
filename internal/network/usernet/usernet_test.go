package usernet

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/network"
)

func TestNewRefuses(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no addresses":            func(c *Config) { *c = Config{} },
		"guest outside network":   func(c *Config) { c.Guest = netip.MustParseAddr("10.0.3.15") },
		"gateway outside network": func(c *Config) { c.Gateway = netip.MustParseAddr("10.0.3.2") },
		"IPv6":                    func(c *Config) { c.Guest = netip.MustParseAddr("fd00::15") },
		"no MAC":                  func(c *Config) { c.GuestMAC = "" },
		"long MAC":                func(c *Config) { c.GuestMAC = "02:00:00:00:00:00:00:01" },
	} {
		t.Run(name, func(t *testing.T) {
			config := testConfig()
			change(&config)
			if n, err := New(config); err == nil {
				_ = n.Close()
				t.Error("New succeeds")
			}
		})
	}
}

// transferSize is how much is sent each way, in bytes.
const transferSize = 10 << 20

func send(conn net.Conn, seed byte) (sum [32]byte, err error) {
	hash := sha256.New()
	data := io.LimitReader(rand.NewChaCha8([32]byte{seed}), transferSize)
	if _, err := io.Copy(io.MultiWriter(conn, hash), data); err != nil {
		return sum, err
	}
	return [32]byte(hash.Sum(nil)), conn.(interface{ CloseWrite() error }).CloseWrite()
}

func receive(conn net.Conn) (sum [32]byte, err error) {
	hash := sha256.New()
	_, err = io.Copy(hash, conn)
	return [32]byte(hash.Sum(nil)), err
}

// exchange sends and receives at once, and returns the sums of both.
func exchange(conn net.Conn, seed byte) (sent, received [32]byte, err error) {
	var receiveErr error
	var reading sync.WaitGroup
	reading.Go(func() { received, receiveErr = receive(conn) })
	sent, err = send(conn, seed)
	reading.Wait()
	return sent, received, errors.Join(err, receiveErr, conn.Close())
}

// Both directions at once, each ended by half closing.
func TestForward(t *testing.T) {
	n := newNetwork(t)
	g := newGuest(t, n)
	type result struct {
		sent, received [32]byte
		err            error
	}
	inGuest := make(chan result, 1)
	g.listen(func(conn net.Conn) {
		var r result
		r.sent, r.received, r.err = exchange(conn, 1)
		inGuest <- r
	})
	listener := listenHost(t)
	n.Forward(listener, echoPort)
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	sent, received, err := exchange(conn, 2)
	if err != nil {
		t.Fatal(err)
	}
	got := <-inGuest
	if got.err != nil || got.sent != received || got.received != sent {
		t.Errorf("what arrives is not what was sent (guest's error: %v)", got.err)
	}
	if usage, err := n.Usage(); usage.Received < transferSize || usage.Sent < transferSize || err != nil {
		t.Errorf("usage is %+v, %v, after %d bytes each way", usage, err, transferSize)
	}
}

// One direction is ended long before the other.
func TestForwardHalfClose(t *testing.T) {
	n := newNetwork(t)
	newGuest(t, n).listen(func(conn net.Conn) {
		request, _ := io.ReadAll(conn)
		_, _ = fmt.Fprintf(conn, "got %s", request)
	})
	listener := listenHost(t)
	n.Forward(listener, echoPort)
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, _ = io.WriteString(conn, "this")
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(conn); string(answer) != "got this" {
		t.Errorf("answer %q, %v", answer, err)
	}
}

// A forward that is closed takes its listener and connections with it, and no others.
func TestForwardClose(t *testing.T) {
	n := newNetwork(t)
	newGuest(t, n).listen(func(conn net.Conn) { _, _ = io.Copy(conn, conn) })
	dial := func(listener net.Listener) net.Conn {
		conn, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		echo(t, conn)
		return conn
	}
	first, second := listenHost(t), listenHost(t)
	closer := n.Forward(first, echoPort)
	n.Forward(second, echoPort)
	ends, stays := dial(first), dial(second)
	if err := closer.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if _, err := ends.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlives its forward")
	}
	if _, err := net.Dial("tcp", first.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connecting to a closed forward: %v", err)
	}
	echo(t, stays)
	_ = closer.Close() // again does no harm
}

// echo sends a word over a connection to an echo server, and waits for it.
func echo(t testing.TB, conn net.Conn) {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 5)
	_, err := io.WriteString(conn, "hello")
	if err == nil {
		_, err = io.ReadFull(conn, answer)
	}
	if err != nil || string(answer) != "hello" {
		t.Fatalf("echo: %q, %v", answer, err)
	}
}

// A connection to a port where nothing listens in the guest ends at once.
func TestForwardRefused(t *testing.T) {
	n := newNetwork(t)
	newGuest(t, n)
	listener := listenHost(t)
	n.Forward(listener, echoPort)
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes", n)
	}
	if _, err := n.DialGuest(t.Context(), 8080); !errors.Is(err, network.ErrRefused) {
		t.Errorf("DialGuest of a port on which nothing listens: %v, want %v", err, network.ErrRefused)
	}
	if _, err := n.DialGuest(t.Context(), 0); err == nil {
		t.Error("DialGuest(0) succeeds")
	}
}

// Closing ends everything, at any time, and again. That no goroutine is left is
// checked at the end of all tests.
func TestClose(t *testing.T) {
	n := newNetwork(t)
	g := newGuest(t, n)
	g.listen(func(conn net.Conn) { _, _ = io.Copy(conn, conn) })
	listener := listenHost(t)
	n.Forward(listener, echoPort)
	conn, err := n.DialGuest(t.Context(), 8080)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, conn)
	forwarded, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = forwarded.Close() }()
	echo(t, forwarded)
	var closing sync.WaitGroup
	for range 2 {
		closing.Go(func() { _ = n.Close() })
	}
	closing.Wait()
	for name, c := range map[string]net.Conn{"DialGuest": conn, "Forward": forwarded} {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("a connection of %s outlives the network", name)
		}
	}
	if _, err := n.DialGuest(t.Context(), 8080); err == nil {
		t.Error("DialGuest succeeds on a closed network")
	}
	late := listenHost(t)
	_ = n.Forward(late, echoPort).Close()
	if _, err := net.Dial("tcp", late.Addr().String()); err == nil {
		t.Error("a forward of a closed network listens")
	}
}

// A guest that takes no frames, as one that is paused, holds nobody up.
func TestStalledGuest(t *testing.T) {
	n := newNetwork(t)
	link := linkConn(t, n)
	config := testConfig()
	// It has said who it is, so the stack sends to it without asking.
	if _, err := link.Write(arpRequest(config)); err != nil {
		t.Fatal(err)
	}
	var dials sync.WaitGroup
	for port := range 600 { // more than the link holds
		dials.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := n.DialGuest(ctx, port+1); err == nil {
				t.Error("a guest that is not there answers")
			}
		})
	}
	dials.Wait()
}
