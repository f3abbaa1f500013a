package shim_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
)

func TestForwards(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	f.opts.Spec.Network = testNetwork()
	first := listen(t)
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.opts.Listeners = []io.Closer{first, packets}
	inherited := shim.Forward{Host: netip.MustParseAddrPort(first.Addr().String()), GuestPort: 22}
	inheritedUDP := shim.Forward{Host: netip.MustParseAddrPort(packets.LocalAddr().String()), GuestPort: 53, Protocol: smolvm.UDP}
	f.opts.Spec.Forwards = []shim.Forward{inherited, inheritedUDP}
	launched := f.launch()
	_, _ = first.Close(), packets.Close()
	client, ctx := f.client(), t.Context()

	added, err := client.AddForward(ctx, shim.Forward{Host: netip.MustParseAddrPort("127.0.0.1:0"), GuestPort: 80})
	if err != nil || added.Host.Port() == 0 || added.GuestPort != 80 {
		t.Fatalf("AddForward: %v, %v", added, err)
	}
	// A port of UDP has nothing to do with that of TCP.
	addedUDP, err := client.AddForward(ctx, shim.Forward{Host: added.Host, GuestPort: 53, Protocol: smolvm.UDP})
	if err != nil {
		t.Fatalf("AddForward: %v", err)
	}
	if status, err := client.Status(ctx); err != nil || len(status.Forwards) != 4 {
		t.Errorf("status is %+v, %v", status, err)
	}
	for _, forward := range []shim.Forward{inheritedUDP, addedUDP} {
		if _, err := client.AddForward(ctx, forward); !errors.Is(err, smolvm.ErrPortInUse) {
			t.Errorf("AddForward of a UDP port that is taken: %v, want %v", err, smolvm.ErrPortInUse)
		}
		if err := client.RemoveForward(ctx, forward); err != nil {
			t.Errorf("RemoveForward: %v", err)
		}
		conn, err := net.ListenPacket("udp", forward.Host.String())
		if err != nil {
			t.Errorf("the port of a UDP forward that was removed: %v", err)
			continue
		}
		_ = conn.Close()
	}
	for _, forward := range []shim.Forward{inherited, added} {
		conn, err := net.Dial("tcp", forward.Host.String())
		if err != nil {
			t.Errorf("nothing listens on %s: %v", forward.Host, err)
			continue
		}
		_ = conn.Close()
	}
	taken := netip.MustParseAddrPort(listen(t).Addr().String())
	for _, host := range []netip.AddrPort{taken, added.Host, inherited.Host} {
		if _, err := client.AddForward(ctx, shim.Forward{Host: host, GuestPort: 81}); !errors.Is(err, smolvm.ErrPortInUse) {
			t.Errorf("AddForward of port that is taken: %v, want %v", err, smolvm.ErrPortInUse)
		}
	}
	for _, forward := range []shim.Forward{inherited, added} {
		if err := client.RemoveForward(ctx, forward); err != nil {
			t.Errorf("RemoveForward: %v", err)
		}
		if _, err := net.Dial("tcp", forward.Host.String()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("connect to a forward that is removed: %v", err)
		}
	}
	if err := client.RemoveForward(ctx, added); !errors.Is(err, smolvm.ErrNotFound) {
		t.Errorf("RemoveForward again: %v, want %v", err, smolvm.ErrNotFound)
	}
	f.stop(patience)
	f.end(launched)
}

// A path that is too long for a socket does not matter.
func TestLongRuntimeDir(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	f.opts.Spec.RuntimeDir = filepath.Join(f.dir, strings.Repeat("long/", 40), "vm")
	launched := f.launch()
	if _, err := f.client().Status(t.Context()); err != nil {
		t.Errorf("status: %v", err)
	}
	f.stop(patience)
	f.end(launched)
}

// Clients that say nothing, or nonsense, keep nobody from being answered.
func TestBadClients(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	launched := f.launch()
	for _, text := range []string{"", "{", "nonsense\n", `{"op":"fly"}` + "\n", `{"op":"dial","port":-1}` + "\n"} {
		conn, err := net.Dial("unix", shim.ControlSocket(f.opts.Spec.RuntimeDir))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.client().Status(t.Context()); err != nil {
		t.Errorf("status: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.client().Stop(ctx, shim.Stop{Grace: patience}); !errors.Is(err, context.Canceled) {
		t.Errorf("stop with a context that is done: %v", err)
	}
	f.stop(patience)
	f.end(launched)
}
