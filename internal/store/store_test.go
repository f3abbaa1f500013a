package store

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"

	"github.com/smolvm/smolvm"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		os.Exit(runChild(path))
	}
	goleak.VerifyTestMain(m)
}

var equalAddrs = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

// clock returns a clock that goes on by a second at each look.
func clock() func() time.Time {
	now := time.Date(2030, 1, 2, 3, 4, 5, 6, time.UTC)
	return func() time.Time {
		now = now.Add(time.Second)
		return now
	}
}

func openTemp(t *testing.T, opts Options) *Store {
	t.Helper()
	return reopen(t, filepath.Join(t.TempDir(), "smolvm.db"), opts)
}

func reopen(t *testing.T, path string, opts Options) *Store {
	t.Helper()
	s, err := Open(t.Context(), path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// newVM is a VM as the manager makes it, with nothing special about it.
func newVM(id string) NewVM {
	config := smolvm.VMConfig{ID: id}.WithDefaults()
	config.Backend = "qemu"
	return NewVM{
		Config:    config,
		Image:     "sha256:" + strings.Repeat("5e", 32),
		Backend:   "qemu",
		DiskPath:  "/var/lib/smolvm/disks/" + id + ".qcow2",
		LogPath:   "/var/lib/smolvm/vms/" + id + "/console.log",
		MachineID: strings.Repeat("0f", 16),
		HostKey:   "-----BEGIN OPENSSH PRIVATE KEY-----\n" + strings.Repeat("QUJD", 80) + "\n-----END OPENSSH PRIVATE KEY-----\n",
	}
}

func mustCreate(t *testing.T, s *Store, n NewVM) VM {
	t.Helper()
	vm, err := s.CreateVM(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

func mustGet(t *testing.T, s *Store, id string) VM {
	t.Helper()
	vm, err := s.GetVM(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

func ids(vms []VM) []string {
	var ids []string
	for _, vm := range vms {
		ids = append(ids, vm.ID)
	}
	return ids
}

func TestVMRoundTrip(t *testing.T) {
	t.Parallel()
	everything := newVM("everything")
	everything.Config = smolvm.VMConfig{
		ID:             "everything",
		VCPUs:          4,
		MemoryMiB:      1024,
		KernelPath:     "/boot/vmlinuz",
		InitrdPath:     "/boot/initrd",
		RootfsPath:     "/srv/root.ext4",
		RootfsBacking:  []smolvm.DiskFile{{Path: "/srv/base.qcow2", Format: smolvm.FormatQCOW2}},
		DiskIOPS:       100,
		BootArgs:       "console=ttyS0 quiet",
		Backend:        "auto",
		DiskMode:       smolvm.DiskShared,
		DiskSizeMiB:    4096,
		RetainDisk:     true,
		Drives:         []smolvm.Drive{{Path: "/srv/b.img", ReadOnly: true}, {Path: "/srv/a.img", Backing: []smolvm.DiskFile{{Path: "/srv/c.img", Format: smolvm.FormatRaw}}}},
		PortForwards:   []smolvm.PortForward{{HostAddr: netip.MustParseAddr("0.0.0.0"), HostPort: 8080, GuestPort: 80, Protocol: smolvm.TCP}},
		SSHHostAddr:    netip.MustParseAddr("::1"),
		AuthorizedKeys: []string{"ssh-ed25519 AAAA you@host"},
		Env:            map[string]string{"LANG": "C", "EMPTY": ""},
		Hostname:       "other",
		Ready:          smolvm.ReadySSH,
		TTL:            time.Hour,
		Ephemeral:      true,
		Network: smolvm.Network{
			Mode: smolvm.NetworkTAP, Pool: netip.MustParsePrefix("10.77.0.0/16"), OpenToVMs: true, ReceiveBitsPerSecond: 1e6, SendBitsPerSecond: 2e6,
		},
	}
	everything.Pool = everything.Config.Network.Pool
	for _, n := range []NewVM{newVM("plain"), everything} {
		t.Run(n.Config.ID, func(t *testing.T) {
			t.Parallel()
			s := openTemp(t, Options{Now: clock()})
			created := mustCreate(t, s, n)
			want := VM{
				ID: n.Config.ID, State: smolvm.StateCreated, Config: n.Config, Lease: 2, SSHPort: 2200,
				Forwards: n.Config.PortForwards, Image: n.Image, Backend: n.Backend, DiskPath: n.DiskPath,
				Pool: n.Pool, LogPath: n.LogPath, MachineID: n.MachineID, HostKey: n.HostKey,
				CreatedAt: time.Date(2030, 1, 2, 3, 4, 6, 6, time.UTC),
			}
			if diff := cmp.Diff(want, created, equalAddrs); diff != "" {
				t.Errorf("CreateVM (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(want, mustGet(t, s, n.Config.ID), equalAddrs); diff != "" {
				t.Errorf("GetVM (-want +got):\n%s", diff)
			}
		})
	}
}

// A VM whose network mode has no forwards takes no port of the host, not even for SSH.
func TestVMWithoutPorts(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	for _, network := range []smolvm.Network{{Mode: smolvm.NetworkNone}, {Mode: smolvm.NetworkBridge, Bridge: "br0"}} {
		n := newVM(string(network.Mode))
		n.Config.Network, n.Config.SSHHostAddr = network, netip.Addr{}
		created := mustCreate(t, s, n)
		if created.SSHPort != 0 || len(created.Forwards) > 0 {
			t.Errorf("its ports: %d, %v", created.SSHPort, created.Forwards)
		}
		if diff := cmp.Diff(created, mustGet(t, s, created.ID), equalAddrs); diff != "" {
			t.Errorf("GetVM (-want +got):\n%s", diff)
		}
	}
	if vm := mustCreate(t, s, newVM("usual")); vm.SSHPort != 2200 {
		t.Errorf("the first port went to somebody: %d", vm.SSHPort)
	}
}

// A VM whose pool is small gets a lease that has an address there, or none.
func TestLastLease(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	for i, want := range []int{2, 3, 0} {
		n := newVM(fmt.Sprintf("vm-%d", i))
		n.LastLease = 3
		vm, err := s.CreateVM(t.Context(), n)
		if (err == nil) != (want > 0) || vm.Lease != want || err != nil && !errors.Is(err, ErrNoneFree) {
			t.Errorf("lease %d, %v, want %d", vm.Lease, err, want)
		}
	}
}

func TestUsualVMNeedsNoOptions(t *testing.T) {
	t.Parallel()
	// Else every VM of a long list would have JSON to parse.
	s := openTemp(t, Options{})
	vm := mustCreate(t, s, newVM("plain"))
	if options, err := packOptions(vm); options != "" || err != nil {
		t.Errorf("options = %q, %v; want none", options, err)
	}
}

func TestListVMs(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	if vms, err := s.ListVMs(t.Context(), ""); err != nil || len(vms) != 0 {
		t.Fatalf("ListVMs of an empty database = %v, %v", vms, err)
	}
	for _, id := range []string{"c", "a", "d", "b"} {
		n := newVM(id)
		if id == "d" {
			n.Config.Env = map[string]string{"ONLY": "here"}
			n.Config.PortForwards = []smolvm.PortForward{{HostPort: 9001, GuestPort: 1, Protocol: smolvm.TCP}, {HostPort: 9000, GuestPort: 2, Protocol: smolvm.UDP}}
		}
		mustCreate(t, s, n)
	}
	start(t, s, "a", "run-1")
	start(t, s, "d", "run-2")
	all, err := s.ListVMs(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := ids(all), []string{"c", "a", "d", "b"}; !slices.Equal(got, want) {
		t.Errorf("ListVMs = %v, want the order of creation, %v", got, want)
	}
	for _, vm := range all {
		if diff := cmp.Diff(mustGet(t, s, vm.ID), vm, equalAddrs); diff != "" {
			t.Errorf("VM %s in the list differs from GetVM (-get +list):\n%s", vm.ID, diff)
		}
	}
	running, err := s.ListVMs(t.Context(), smolvm.StateRunning)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]VM{all[1], all[2]}, running, equalAddrs); diff != "" {
		t.Errorf("running VMs (-want +got):\n%s", diff)
	}
}

func TestCreateTwice(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	first := mustCreate(t, s, newVM("web"))
	_, err := s.CreateVM(t.Context(), newVM("web"))
	if !errors.Is(err, smolvm.ErrVMAlreadyExists) || !strings.Contains(err.Error(), `"web"`) {
		t.Errorf("error = %v, want ErrVMAlreadyExists that names the VM", err)
	}
	if diff := cmp.Diff(first, mustGet(t, s, "web"), equalAddrs); diff != "" {
		t.Errorf("the VM changed (-before +after):\n%s", diff)
	}
	// The failed one has left no lease or port behind.
	if second := mustCreate(t, s, newVM("db")); second.Lease != 3 || second.SSHPort != 2201 {
		t.Errorf("next VM has lease %d and port %d, want 3 and 2201", second.Lease, second.SSHPort)
	}
}

func TestUnknownVM(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	ctx := t.Context()
	calls := map[string]func() error{
		"GetVM":          func() error { _, err := s.GetVM(ctx, "no"); return err },
		"DeleteVM":       func() error { return s.DeleteVM(ctx, "no") },
		"MarkStarted":    func() error { return s.MarkStarted(ctx, "no", Started{}) },
		"MarkFailed":     func() error { return s.MarkFailed(ctx, "no", "why", time.Now()) },
		"MarkNotStarted": func() error { return s.MarkNotStarted(ctx, "no", smolvm.StateStopped, "why") },
		"SetState":       func() error { return s.SetState(ctx, "no", smolvm.States(), smolvm.StatePaused) },
		"Ports.MoveSSH":  func() error { _, err := s.Ports().MoveSSH(ctx, "no", nil); return err },
		"AddForward": func() error {
			_, err := s.Ports().AddForward(ctx, "no", smolvm.PortForward{HostPort: 80, GuestPort: 80}, nil)
			return err
		},
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, smolvm.ErrVMNotFound) || !strings.Contains(err.Error(), `"no"`) {
			t.Errorf("%s: error = %v, want ErrVMNotFound that names the VM", name, err)
		}
	}
	if err := s.Ports().RemoveForward(ctx, "no", smolvm.TCP, 80); !errors.Is(err, smolvm.ErrNotFound) {
		t.Errorf("RemoveForward: error = %v, want ErrNotFound", err)
	}
	if changed, err := s.MarkEnded(ctx, "no", "run", smolvm.StateStopped, "why", time.Now()); changed || err != nil {
		t.Errorf("MarkEnded = %v, %v; want no change and no error", changed, err)
	}
}

func TestCancelledContext(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.CreateVM(ctx, newVM("web")); !errors.Is(err, context.Canceled) {
		t.Errorf("CreateVM: error = %v, want context.Canceled", err)
	}
	if _, err := s.ListVMs(ctx, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("ListVMs: error = %v, want context.Canceled", err)
	}
}

func TestImages(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	for id, image := range map[string]string{"b": "sha256:1", "a": "sha256:1", "c": "sha256:2", "paths": ""} {
		n := newVM(id)
		n.Image = image
		mustCreate(t, s, n)
	}
	users, err := s.UsersOfImage(t.Context(), "sha256:1")
	if err != nil || !slices.Equal(users, []string{"a", "b"}) {
		t.Errorf("UsersOfImage = %v, %v; want a and b", users, err)
	}
	if users, err := s.UsersOfImage(t.Context(), "sha256:3"); err != nil || len(users) != 0 {
		t.Errorf("UsersOfImage of an unused image = %v, %v; want none", users, err)
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{Now: clock()})
	mustCreate(t, s, newVM("web"))
	at := time.Date(2031, 5, 6, 7, 8, 9, 10, time.UTC)
	events := []smolvm.Event{
		{VMID: "web", Actor: "smolvm[1]", Action: "create", At: at, Duration: 5 * time.Millisecond},
		{VMID: "db", Actor: "smolvm[2]", Action: "create", At: at},
		{VMID: "web", Actor: "shim[3]", Action: "exit", Detail: "guest powered off"},
	}
	for _, e := range events {
		if err := s.Events().Add(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	events[2].At = time.Date(2030, 1, 2, 3, 4, 7, 6, time.UTC) // by the clock
	for i := range events {
		events[i].ID = int64(i + 1)
	}
	if err := s.DeleteVM(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		vm    string
		limit int
		want  []smolvm.Event
	}{
		{"", 0, events},
		{"", 2, events[1:]},
		{"web", 0, []smolvm.Event{events[0], events[2]}},
		{"web", 1, []smolvm.Event{events[2]}},
		{"no", 10, nil},
	}
	for _, test := range tests {
		got, err := s.Events().Newest(t.Context(), test.vm, test.limit)
		if diff := cmp.Diff(test.want, got); diff != "" || err != nil {
			t.Errorf("Events(%q, %d): %v (-want +got):\n%s", test.vm, test.limit, err, diff)
		}
	}
}

func TestOldEventsAreDropped(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	for range 3 {
		if err := s.Events().Add(t.Context(), smolvm.Event{VMID: "web", Action: "old"}); err != nil {
			t.Fatal(err)
		}
	}
	// As if the events between had been there: the next one has id keptEvents+2.
	_, err := s.write.ExecContext(t.Context(), "UPDATE events SET id = ? WHERE id = 3", keptEvents+1)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Events().Add(t.Context(), smolvm.Event{VMID: "web", Action: "new"}); err != nil {
		t.Fatal(err)
	}
	var got []string
	events, err := s.Events().Newest(t.Context(), "", 0)
	for _, e := range events {
		got = append(got, fmt.Sprintf("%d %s", e.ID, e.Action))
	}
	want := []string{fmt.Sprint(keptEvents+1, " old"), fmt.Sprint(keptEvents+2, " new")}
	if !slices.Equal(got, want) || err != nil {
		t.Errorf("events = %q, %v; want %q", got, err, want)
	}
}
