package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/stream"
)

// fakeAttachment is a network whose guest answers each connection with the port that it was
// made to. Methods that it does not have are not called by these tests.
type fakeAttachment struct{ network.Attachment }

func (fakeAttachment) DialGuest(_ context.Context, port int) (net.Conn, error) {
	ours, guests := net.Pipe()
	go func() {
		_, _ = fmt.Fprintf(guests, "port %d", port)
		_ = guests.Close()
	}()
	return ours, nil
}

func (a fakeAttachment) Forward(listener net.Listener, guestPort int) io.Closer {
	return stream.Forward(listener, func(ctx context.Context) (net.Conn, error) { return a.DialGuest(ctx, guestPort) })
}

func (fakeAttachment) ForwardPackets(conn *net.UDPConn, _ int) io.Closer { return conn }

// newTest returns the session of a VM that has not been started.
func newTest(attached network.Attachment) *Session {
	s := New(shim.Spec{ID: "vm"}, Options{Log: slog.New(slog.DiscardHandler)})
	s.network = attached
	return s
}

// Forwards are those of whichever network the VM has, each under its host port and protocol.
func TestForwardsOfAnyNetwork(t *testing.T) {
	s, anyPort := newTest(fakeAttachment{}), netip.MustParseAddrPort("127.0.0.1:0")
	added, err := s.Forwards().Add(t.Context(), shim.Forward{Host: anyPort, GuestPort: 80})
	if err != nil {
		t.Fatal(err)
	}
	sameUDP, err := s.Forwards().Add(t.Context(), shim.Forward{Host: added.Host, GuestPort: 53, Protocol: smolvm.UDP})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", added.Host.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if said, err := io.ReadAll(conn); string(said) != "port 80" {
		t.Errorf("the guest says %q, %v", said, err)
	}
	for _, forward := range []shim.Forward{added, sameUDP} {
		if err := s.Forwards().Remove(forward); err != nil {
			t.Errorf("remove %+v: %v", forward, err)
		}
		if err := s.Forwards().Remove(forward); !errors.Is(err, smolvm.ErrNotFound) {
			t.Errorf("remove %+v again: %v", forward, err)
		}
	}
	if _, err := newTest(nil).Forwards().Add(t.Context(), shim.Forward{Host: anyPort, GuestPort: 80}); !errors.Is(err, smolvm.ErrUnsupported) {
		t.Errorf("a forward to a VM without a network: %v", err)
	}
}
