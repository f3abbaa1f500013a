package store

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/smolvm/smolvm"
)

var loopback = netip.MustParseAddr("127.0.0.1")

func forward(hostPort, guestPort int) smolvm.PortForward {
	return smolvm.PortForward{Protocol: smolvm.TCP, HostAddr: loopback, HostPort: hostPort, GuestPort: guestPort}
}

// except says that all ports but some are free.
func except(taken ...int) PortFree {
	return func(_ smolvm.Protocol, _ netip.Addr, port int) bool { return !slices.Contains(taken, port) }
}

func TestSSHPortSkipsOtherPrograms(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	n := newVM("web")
	n.Config.SSHHostAddr = netip.MustParseAddr("127.0.0.7")
	n.PortFree = func(_ smolvm.Protocol, addr netip.Addr, port int) bool {
		if addr != n.Config.SSHHostAddr {
			t.Errorf("asked about address %s, want %s", addr, n.Config.SSHHostAddr)
		}
		return port >= 2203
	}
	if vm := mustCreate(t, s, n); vm.SSHPort != 2203 {
		t.Errorf("port = %d, want 2203", vm.SSHPort)
	}
	if vm := mustCreate(t, s, newVM("db")); vm.SSHPort != 2200 {
		t.Errorf("port = %d, want 2200, which is free by now", vm.SSHPort)
	}
}

func TestDeleteGivesBack(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	for i := range 5 {
		n := newVM(fmt.Sprintf("vm-%d", i))
		n.Config.PortForwards = []smolvm.PortForward{forward(8000+i, 80)}
		mustCreate(t, s, n)
	}
	for _, id := range []string{"vm-1", "vm-3"} {
		if err := s.DeleteVM(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for _, id := range []string{"a", "b", "c"} {
		n := newVM(id)
		if id == "a" {
			n.Config.PortForwards = []smolvm.PortForward{forward(8003, 80)}
		}
		vm := mustCreate(t, s, n)
		got = append(got, fmt.Sprint(vm.Lease, " ", vm.SSHPort))
	}
	if want := []string{"3 2201", "5 2203", "7 2205"}; !slices.Equal(got, want) {
		t.Errorf("leases and ports = %q, want %q", got, want)
	}
}

func TestForwards(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "smolvm.db")
	s := reopen(t, path, Options{})
	n := newVM("web")
	// The first asks for any port; it must not get what the second asks for.
	n.Config.PortForwards = []smolvm.PortForward{forward(0, 1), forward(2201, 2)}
	vm := mustCreate(t, s, n)
	want := []smolvm.PortForward{forward(2202, 1), forward(2201, 2)}
	if diff := cmp.Diff(want, vm.Forwards, equalAddrs); diff != "" || vm.SSHPort != 2200 {
		t.Fatalf("SSH port %d, forwards (-want +got):\n%s", vm.SSHPort, diff)
	}
	for _, f := range []smolvm.PortForward{forward(9000, 3), forward(80, 4), forward(0, 5)} {
		added, err := s.Ports().AddForward(t.Context(), "web", f, except(2203))
		if err != nil {
			t.Fatal(err)
		}
		if f.HostPort == 0 {
			f.HostPort = 2204
		}
		if added != f {
			t.Errorf("added %v, want %v", added, f)
		}
		want = append(want, f)
	}
	if err := s.Ports().RemoveForward(t.Context(), "web", smolvm.TCP, 2201); err != nil {
		t.Fatal(err)
	}
	want = slices.Delete(want, 1, 2)
	start(t, s, "web", "run")
	if _, err := s.MarkEnded(t.Context(), "web", "run", smolvm.StateStopped, "", startedAt); err != nil {
		t.Fatal(err)
	}
	vm = mustGet(t, reopen(t, path, Options{}), "web")
	if diff := cmp.Diff(want, vm.Forwards, equalAddrs); diff != "" {
		t.Errorf("forwards after a run (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(n.Config, vm.Config, equalAddrs); diff != "" {
		t.Errorf("the configuration changed (-want +got):\n%s", diff)
	}
	for _, port := range []int{vm.SSHPort, 2201, 1} {
		if err := s.Ports().RemoveForward(t.Context(), "web", smolvm.TCP, port); !errors.Is(err, smolvm.ErrNotFound) {
			t.Errorf("remove forward of port %d: error = %v, want ErrNotFound", port, err)
		}
	}
}

func TestPortInUse(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	owner := newVM("owner")
	owner.Config.PortForwards = []smolvm.PortForward{forward(8080, 80)}
	mustCreate(t, s, owner)
	mustCreate(t, s, newVM("other"))
	check := func(what string, err error, owner string) {
		t.Helper()
		if !errors.Is(err, smolvm.ErrPortInUse) || !strings.Contains(err.Error(), `"`+owner+`"`) {
			t.Errorf("%s: error = %v, want ErrPortInUse that names %s", what, err, owner)
		}
	}
	for _, port := range []int{8080, 2200} {
		n := newVM("late")
		n.Config.PortForwards = []smolvm.PortForward{forward(9999, 1), forward(port, 80)}
		_, err := s.CreateVM(t.Context(), n)
		check(fmt.Sprintf("create with port %d", port), err, "owner")
		_, err = s.Ports().AddForward(t.Context(), "other", forward(port, 80), nil)
		check(fmt.Sprintf("add port %d", port), err, "owner")
	}
	_, err := s.Ports().AddForward(t.Context(), "owner", forward(8080, 81), nil)
	check("add its own port", err, "owner")
	if _, err := s.GetVM(t.Context(), "late"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("VM that could not be created: error = %v, want ErrVMNotFound", err)
	}
	if _, err := s.Ports().AddForward(t.Context(), "other", forward(9999, 1), nil); err != nil {
		t.Errorf("a port of the VM that could not be created is still taken: %v", err)
	}
}

func TestMoveSSHPort(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	mustCreate(t, s, newVM("a"))
	mustCreate(t, s, newVM("b"))
	n := newVM("c")
	n.Config.PortForwards = []smolvm.PortForward{forward(2203, 80)}
	mustCreate(t, s, n)
	var asked []int
	port, err := s.Ports().MoveSSH(t.Context(), "a", func(_ smolvm.Protocol, addr netip.Addr, port int) bool {
		if addr != loopback {
			t.Errorf("asked about address %s, want %s", addr, loopback)
		}
		asked = append(asked, port)
		return port >= 2205
	})
	if err != nil || port != 2205 {
		t.Fatalf("port = %d, %v; want 2205", port, err)
	}
	if want := []int{2204, 2205}; !slices.Equal(asked, want) {
		t.Errorf("asked about ports %v, want only those that no VM has, %v", asked, want)
	}
	if got := mustGet(t, s, "a").SSHPort; got != 2205 {
		t.Errorf("VM has port %d, want 2205", got)
	}
	if vm := mustCreate(t, s, newVM("d")); vm.SSHPort != 2200 {
		t.Errorf("next VM has port %d, want the one that was given up, 2200", vm.SSHPort)
	}
}

// A forward moves on as SSH does if its port was chosen here; one that was named stays.
func TestMoveForward(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	n := newVM("a")
	n.Config.PortForwards = []smolvm.PortForward{forward(0, 80), forward(8080, 81)}
	vm := mustCreate(t, s, n)
	added, err := s.Ports().AddForward(t.Context(), "a", forward(0, 82), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []smolvm.PortForward{forward(2300, 80), forward(8080, 81), forward(2301, 82)}
	for i, f := range []smolvm.PortForward{vm.Forwards[0], added} {
		port, err := s.Ports().MoveForward(t.Context(), "a", f, func(protocol smolvm.Protocol, addr netip.Addr, port int) bool {
			if protocol != smolvm.TCP || addr != loopback {
				t.Errorf("asked about %s of %s", protocol, addr)
			}
			return port >= 2300
		})
		if err != nil || port != 2300+i {
			t.Errorf("port = %d, %v; want %d", port, err, 2300+i)
		}
	}
	for name, f := range map[string]smolvm.PortForward{"named": forward(8080, 81), "moved": vm.Forwards[0], "SSH's": forward(vm.SSHPort, 22)} {
		if port, err := s.Ports().MoveForward(t.Context(), "a", f, nil); !errors.Is(err, smolvm.ErrNotFound) {
			t.Errorf("%s: port = %d, error = %v, want ErrNotFound", name, port, err)
		}
	}
	if diff := cmp.Diff(want, mustGet(t, s, "a").Forwards, equalAddrs); diff != "" {
		t.Errorf("forwards (-want +got):\n%s", diff)
	}
}

func TestNoneFree(t *testing.T) {
	t.Parallel()
	leases := openTemp(t, Options{Leases: Range{2, 3}})
	ports := openTemp(t, Options{Ports: Range{2200, 2201}})
	for _, id := range []string{"a", "b"} {
		mustCreate(t, leases, newVM(id))
		mustCreate(t, ports, newVM(id))
	}
	_, leaseErr := leases.CreateVM(t.Context(), newVM("c"))
	_, portErr := ports.CreateVM(t.Context(), newVM("c"))
	_, forwardErr := ports.Ports().AddForward(t.Context(), "a", forward(0, 80), nil)
	_, moveErr := ports.Ports().MoveSSH(t.Context(), "a", nil)
	for text, err := range map[string]error{"all leases from 2 to 3": leaseErr, "all host ports from 2200 to 2201": portErr} {
		if !errors.Is(err, ErrNoneFree) || !strings.Contains(err.Error(), text) {
			t.Errorf("error = %v, want ErrNoneFree with %q", err, text)
		}
	}
	for _, err := range []error{forwardErr, moveErr} {
		if !errors.Is(err, ErrNoneFree) {
			t.Errorf("error = %v, want ErrNoneFree", err)
		}
	}
	// Ports that are asked for by number need not be in the range.
	if _, err := ports.Ports().AddForward(t.Context(), "a", forward(80, 80), nil); err != nil {
		t.Error(err)
	}
}

// TestPortModel compares leases and SSH ports with a model: each new VM gets the
// lowest of both that no living VM has.
func TestPortModel(t *testing.T) {
	t.Parallel()
	dir, databases := t.TempDir(), 0
	rapid.Check(t, func(rt *rapid.T) {
		databases++
		opts := Options{Leases: Range{2, 9}, Ports: Range{2200, 2299}}
		s, err := Open(t.Context(), filepath.Join(dir, fmt.Sprintf("%d.db", databases)), opts)
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		leases, ports := map[int]string{}, map[int]string{}
		lowest := func(taken map[int]string, from int) int {
			for ; taken[from] != ""; from++ {
			}
			return from
		}
		created := 0
		rt.Repeat(map[string]func(*rapid.T){
			"create": func(rt *rapid.T) {
				created++
				id := fmt.Sprintf("vm-%d", created)
				vm, err := s.CreateVM(t.Context(), newVM(id))
				if len(leases) == 8 {
					if !errors.Is(err, ErrNoneFree) {
						rt.Fatalf("error = %v, want ErrNoneFree", err)
					}
					return
				}
				if err != nil {
					rt.Fatal(err)
				}
				if want := lowest(leases, 2); vm.Lease != want {
					rt.Fatalf("lease = %d, want %d", vm.Lease, want)
				}
				if want := lowest(ports, 2200); vm.SSHPort != want {
					rt.Fatalf("port = %d, want %d", vm.SSHPort, want)
				}
				leases[vm.Lease], ports[vm.SSHPort] = id, id
			},
			"delete": func(rt *rapid.T) {
				vms, err := s.ListVMs(t.Context(), "")
				if err != nil {
					rt.Fatal(err)
				}
				if len(vms) == 0 {
					rt.Skip("no VM to delete")
				}
				vm := rapid.SampledFrom(vms).Draw(rt, "vm")
				if err := s.DeleteVM(t.Context(), vm.ID); err != nil {
					rt.Fatal(err)
				}
				delete(leases, vm.Lease)
				delete(ports, vm.SSHPort)
			},
			"": func(rt *rapid.T) {
				vms, err := s.ListVMs(t.Context(), "")
				if err != nil {
					rt.Fatal(err)
				}
				got := map[int]string{}
				for _, vm := range vms {
					got[vm.Lease] = vm.ID
				}
				if diff := cmp.Diff(leases, got); diff != "" {
					rt.Fatalf("leases (-want +got):\n%s", diff)
				}
			},
		})
	})
}

// TCP and UDP have ports of their own, chosen and named ones.
func TestPortsOfBothProtocols(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	udp := func(hostPort int) smolvm.PortForward {
		f := forward(hostPort, 53)
		f.Protocol = smolvm.UDP
		return f
	}
	n := newVM("web")
	n.Config.PortForwards = []smolvm.PortForward{forward(8080, 53), udp(8080), udp(0), forward(0, 53)}
	vm := mustCreate(t, s, n)
	want := []smolvm.PortForward{forward(8080, 53), udp(8080), udp(2200), forward(2201, 53)}
	if diff := cmp.Diff(want, mustGet(t, s, "web").Forwards, equalAddrs); vm.SSHPort != 2200 || diff != "" {
		t.Errorf("SSH port %d, forwards (-want +got):\n%s", vm.SSHPort, diff)
	}
	mustCreate(t, s, newVM("other"))
	if _, err := s.Ports().AddForward(t.Context(), "other", udp(8080), nil); !errors.Is(err, smolvm.ErrPortInUse) {
		t.Errorf("add a port of another VM: error = %v, want ErrPortInUse", err)
	}
	if err := s.Ports().RemoveForward(t.Context(), "web", smolvm.TCP, 2200); !errors.Is(err, smolvm.ErrNotFound) {
		t.Errorf("remove the forward of SSH: error = %v, want ErrNotFound", err)
	}
	if err := s.Ports().RemoveForward(t.Context(), "web", smolvm.UDP, 8080); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(slices.Delete(want, 1, 2), mustGet(t, s, "web").Forwards, equalAddrs); diff != "" {
		t.Errorf("forwards without one (-want +got):\n%s", diff)
	}
}

// Ports from before there were protocols are those of TCP.
func TestMigratePorts(t *testing.T) {
	t.Parallel()
	steps, err := migrations()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(steps, func(step string) bool { return strings.Contains(step, "ports_by_protocol") })
	db := openTemp(t, Options{}).write
	for _, statement := range []string{
		"DROP TABLE ports",
		`CREATE TABLE ports (seq INTEGER PRIMARY KEY, vm INTEGER NOT NULL REFERENCES vms (seq) ON DELETE CASCADE,
			kind TEXT NOT NULL, host_addr TEXT NOT NULL, host_port INTEGER NOT NULL UNIQUE, guest_port INTEGER NOT NULL) STRICT`,
		"CREATE INDEX ports_by_vm ON ports (vm)",
		"INSERT INTO vms (seq, id, state, lease) VALUES (1, 'web', 'created', 2)",
		"INSERT INTO ports VALUES (5, 1, 'ssh', '127.0.0.1', 2200, 22), (7, 1, 'forward', '0.0.0.0', 8080, 80)",
		steps[i],
	} {
		if _, err := db.ExecContext(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	var text string
	err = db.QueryRowContext(t.Context(),
		"SELECT group_concat(concat_ws(' ', seq, vm, kind, protocol, host_addr, host_port, guest_port), '; ') FROM ports").Scan(&text)
	if want := "5 1 ssh tcp 127.0.0.1 2200 22; 7 1 forward tcp 0.0.0.0 8080 80"; err != nil || text != want {
		t.Errorf("ports are %q, %v; want %q", text, err, want)
	}
}
