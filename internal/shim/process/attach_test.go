package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"reflect"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/stream"
	"github.com/smolvm/smolvm/internal/testenv"
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

func newTestProcess(attached network.Attachment) *process {
	return &process{
		network:  attached,
		log:      slog.New(slog.DiscardHandler),
		forwards: map[shim.Forward]io.Closer{},
	}
}

// Forwards are those of whichever network the VM has, each under its host port and protocol.
func TestForwardsOfAnyNetwork(t *testing.T) {
	s, anyPort := newTestProcess(fakeAttachment{}), netip.MustParseAddrPort("127.0.0.1:0")
	added, err := s.addForward(t.Context(), shim.Forward{Host: anyPort, GuestPort: 80})
	if err != nil {
		t.Fatal(err)
	}
	sameUDP, err := s.addForward(t.Context(), shim.Forward{Host: added.Host, GuestPort: 53, Protocol: smolvm.UDP})
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
		if err := s.removeForward(forward); err != nil {
			t.Errorf("remove %+v: %v", forward, err)
		}
		if err := s.removeForward(forward); !errors.Is(err, smolvm.ErrNotFound) {
			t.Errorf("remove %+v again: %v", forward, err)
		}
	}
	if _, err := newTestProcess(nil).addForward(t.Context(), shim.Forward{Host: anyPort, GuestPort: 80}); !errors.Is(err, smolvm.ErrUnsupported) {
		t.Errorf("a forward to a VM without a network: %v", err)
	}
}

func TestAttachUnknownMode(t *testing.T) {
	for _, mode := range []smolvm.NetworkMode{network.TAP, "bridge", "USER"} {
		attached, err := newTestProcess(nil).attach(network.Config{Mode: mode})
		if !errors.Is(err, smolvm.ErrUnsupported) || smolvm.HintOf(err) == "" || attached != nil {
			t.Errorf("%q: %v, %v", mode, attached, err)
		}
	}
}

// A VM that stands by in one mode is not claimed for another, and can be claimed again.
func TestClaimInAnotherMode(t *testing.T) {
	for _, test := range []struct {
		is, asked *network.Config
		refused   bool
	}{
		{&network.Config{}, &network.Config{Mode: network.TAP}, true},
		{&network.Config{}, nil, true},
		{nil, &network.Config{}, true},
		{&network.Config{}, &network.Config{Mode: smolvm.NetworkUser}, false},
		{nil, nil, false},
	} {
		s := newTestProcess(nil)
		s.spec = shim.Spec{ID: "stood-by", Network: test.is}
		before := s.spec
		claimer, ours := testenv.UnixPair(t)
		text, err := json.Marshal(shim.ClaimOrder{Spec: shim.Spec{ID: "claims", Network: test.asked}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := claimer.Write(append(text, '\n')); err != nil {
			t.Fatal(err)
		}
		err = s.takeClaim(ours) // it fails in any case, as no files come
		if err == nil || errors.Is(err, smolvm.ErrUnsupported) != test.refused {
			t.Errorf("a VM in mode %q is claimed for mode %q: %v", test.is.UsedMode(), test.asked.UsedMode(), err)
		}
		if !reflect.DeepEqual(s.spec, before) {
			t.Errorf("a claim that was refused leaves %+v", s.spec)
		}
	}
	s := newTestProcess(nil)
	s.spec.Network = &network.Config{}
	claimer, ours := testenv.UnixPair(t)
	if _, err := claimer.Write([]byte(`{"dismiss":true}` + "\n")); err != nil {
		t.Fatal(err)
	}
	if err := s.takeClaim(ours); !errors.Is(err, errDismissed) {
		t.Errorf("a dismissal names no mode: %v, want %v", err, errDismissed)
	}
}
