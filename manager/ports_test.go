package manager_test

import (
	"errors"
	"hash/fnv"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
)

// ownAddr is an address of the host that no other test has ports of, also where tests of
// several data directories, each of which looks for the lowest free port, run at once.
func ownAddr(t *testing.T) netip.Addr {
	t.Helper()
	hash := fnv.New32()
	_, _ = hash.Write([]byte(t.Name()))
	sum := hash.Sum32()
	return netip.AddrFrom4([4]byte{127, 1 + byte(sum>>16)%250, byte(sum >> 8), 1 + byte(sum)%250})
}

// A TCP server in the guest is reached by each of the ways.
func TestPortForwards(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	ctx := t.Context()
	addr := ownAddr(t)
	vm := mustRun(t, m, smolvm.VMConfig{PortForwards: []smolvm.PortForward{{HostAddr: addr, GuestPort: 8000}}})
	sh(t, m, vm.ID, "mkdir /www && echo page > /www/index.html && httpd -p 8000 -h /www")
	forwards, err := m.PortForwards(ctx, vm.ID)
	if err != nil || len(forwards) != 1 || forwards[0].HostPort == 0 {
		t.Fatalf("forwards %v, %v", forwards, err)
	}
	if got := get(t, dialTCP(t, forwards[0])); !strings.Contains(got, "page") {
		t.Errorf("by a forward of the configuration: %q", got)
	}
	conn, err := m.Dial(ctx, vm.ID, "tcp", "127.0.0.1:8000")
	if err != nil {
		t.Fatal(err)
	}
	if got := get(t, conn); !strings.Contains(got, "page") {
		t.Errorf("by Dial: %q", got)
	}
	if _, err := m.Dial(ctx, vm.ID, "tcp", "127.0.0.1:9"); err == nil {
		t.Error("Dial to a port where nobody listens succeeds")
	}

	added, err := m.AddPortForward(ctx, vm.ID, smolvm.PortForward{HostAddr: addr, GuestPort: 8000})
	if err != nil {
		t.Fatal(err)
	}
	if got := get(t, dialTCP(t, added)); !strings.Contains(got, "page") {
		t.Errorf("by a forward that was added: %q", got)
	}
	if _, err := m.AddPortForward(ctx, vm.ID, added); !errors.Is(err, smolvm.ErrPortInUse) {
		t.Errorf("the same forward twice: %v", err)
	}
	var network *smolvm.NetworkError
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	foreign := smolvm.PortForward{HostPort: taken.Addr().(*net.TCPAddr).Port, GuestPort: 1}
	if _, err := m.AddPortForward(ctx, vm.ID, foreign); !errors.Is(err, smolvm.ErrPortInUse) || !errors.As(err, &network) {
		t.Errorf("a port of another program: %v", err)
	}
	if err := m.RemovePortForward(ctx, vm.ID, added); err != nil {
		t.Fatal(err)
	}
	if _, err := net.Dial("tcp", hostAddr(added)); err == nil {
		t.Error("a forward that was removed still answers")
	}
	if err := m.RemovePortForward(ctx, vm.ID, added); !errors.Is(err, smolvm.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	if forwards, err := m.PortForwards(ctx, vm.ID); err != nil || len(forwards) != 1 {
		t.Errorf("forwards %v, %v", forwards, err)
	}
}
