package smolvm_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
)

func TestDefaults(t *testing.T) {
	got := smolvm.VMConfig{ID: "web", PortForwards: []smolvm.PortForward{{HostPort: 80, GuestPort: 80}}}.WithDefaults()
	if got.VCPUs != 2 || got.MemoryMiB != 512 || got.Image != "base" || got.DiskMode != smolvm.DiskIsolated ||
		got.Ready != smolvm.ReadyAgent || got.Hostname != "web" || got.SSHHostAddr.String() != "127.0.0.1" ||
		got.PortForwards[0].HostAddr.String() != "127.0.0.1" || got.BootArgs != "" {
		t.Errorf("with defaults: %+v", got)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
	own := smolvm.VMConfig{ID: "own", KernelPath: "kernel", RootfsPath: "/disk"}.WithDefaults()
	if own.Image != "" || own.BootArgs != "console=ttyS0 reboot=k panic=1 pci=off" || own.Ready != smolvm.ReadyStarted ||
		!strings.HasPrefix(own.KernelPath, "/") || own.RootfsPath != "/disk" {
		t.Errorf("with a kernel: %+v", own)
	}
}

// A configuration's defaults must not reach back into the caller's slices.
func TestDefaultsCopy(t *testing.T) {
	given := smolvm.VMConfig{ID: "a", PortForwards: []smolvm.PortForward{{GuestPort: 1}}, Drives: []smolvm.Drive{{Path: "d"}}}
	_ = given.WithDefaults()
	if given.PortForwards[0].HostAddr.IsValid() || given.Drives[0].Path != "d" {
		t.Errorf("the caller's configuration has changed: %+v", given)
	}
}

func TestIDs(t *testing.T) {
	for id, want := range map[string]bool{
		"a": true, "0": true, "web-1": true, "a--b": true, strings.Repeat("a", 64): true, smolvm.NewID(): true,
		"": false, "-a": false, "a-": false, "A": false, "a_b": false, "a.b": false, "a/b": false, "..": false,
		"ä": false, "a\n": false, strings.Repeat("a", 65): false,
	} {
		if err := smolvm.ValidateID(id); (err == nil) != want {
			t.Errorf("id %q: %v", id, err)
		}
	}
}

func TestValidate(t *testing.T) {
	for field, edit := range map[string]func(*smolvm.VMConfig){
		"id":                 func(c *smolvm.VMConfig) { c.ID = "A" },
		"vcpus":              func(c *smolvm.VMConfig) { c.VCPUs = 33 },
		"memory_mib":         func(c *smolvm.VMConfig) { c.MemoryMiB = 127 },
		"backend":            func(c *smolvm.VMConfig) { c.Backend = "xen" },
		"initrd_path":        func(c *smolvm.VMConfig) { c.InitrdPath = "/i" },
		"image":              func(c *smolvm.VMConfig) { c.KernelPath, c.RootfsPath = "/k", "/r" },
		"ready":              func(c *smolvm.VMConfig) { c.Ready = "soon" },
		"boot_args":          func(c *smolvm.VMConfig) { c.BootArgs = "a\nb" },
		"ttl_ns":             func(c *smolvm.VMConfig) { c.TTL = -1 },
		"disk_mode":          func(c *smolvm.VMConfig) { c.DiskMode = smolvm.DiskShared },
		"disk_size_mib":      func(c *smolvm.VMConfig) { c.DiskSizeMiB = -1 },
		"drives":             func(c *smolvm.VMConfig) { c.Drives = make([]smolvm.Drive, 26) },
		"drives[0].path":     func(c *smolvm.VMConfig) { c.Drives = []smolvm.Drive{{}} },
		"env":                func(c *smolvm.VMConfig) { c.Env = map[string]string{"a-b": ""} },
		"hostname":           func(c *smolvm.VMConfig) { c.Hostname = "a b" },
		"authorized_keys[0]": func(c *smolvm.VMConfig) { c.AuthorizedKeys = []string{"key"} },
		"port_forwards[1].host_port": func(c *smolvm.VMConfig) {
			local := netip.MustParseAddr("127.0.0.1")
			c.PortForwards = []smolvm.PortForward{
				{HostAddr: local, HostPort: 80, GuestPort: 1, Protocol: smolvm.TCP},
				{HostAddr: local, HostPort: 80, GuestPort: 2, Protocol: smolvm.TCP},
			}
		},
		"port_forwards[0].protocol": func(c *smolvm.VMConfig) {
			c.PortForwards = []smolvm.PortForward{{GuestPort: 1, Protocol: "sctp"}}
		},
	} {
		t.Run(field, func(t *testing.T) {
			config := smolvm.VMConfig{ID: "web"}.WithDefaults()
			edit(&config)
			err := config.Validate()
			var invalid *smolvm.ValidationError
			if !errors.As(err, &invalid) || invalid.Fields[0].Field != field && !strings.Contains(err.Error(), field+":") {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func TestErrorsMatch(t *testing.T) {
	for _, err := range []error{smolvm.ErrVMNotFound, smolvm.ErrImageNotFound} {
		if !errors.Is(fmt.Errorf("get %q: %w", "x", err), smolvm.ErrNotFound) {
			t.Errorf("%v is no ErrNotFound", err)
		}
	}
	network := &smolvm.NetworkError{ID: "web", Op: "forward", Err: smolvm.ErrPortInUse}
	if !errors.Is(network, smolvm.ErrPortInUse) || !strings.Contains(network.Error(), `"web"`) {
		t.Errorf("network error: %v", network)
	}
	missing := &smolvm.PrerequisiteError{Backend: "qemu", Findings: []smolvm.Finding{
		{Name: "qemu", Problem: "not found", Why: "runs the VMs", Fix: "apt-get install qemu"},
	}}
	if want := "backend qemu can't run on this host: qemu: not found (runs the VMs); to mend it: apt-get install qemu"; missing.Error() != want {
		t.Errorf("got %q, want %q", missing.Error(), want)
	}
}

func TestExitStatus(t *testing.T) {
	for status, want := range map[smolvm.ExitStatus]string{
		{}:                          "exit status 0",
		{Code: 3}:                   "exit status 3",
		{Code: 137, Signal: "KILL"}: "ended by SIGKILL",
	} {
		if status.String() != want || status.Success() != (status == smolvm.ExitStatus{}) {
			t.Errorf("%+v is %q", status, status)
		}
	}
}

// TCP and UDP have ports of their own.
func TestForwardsOfBothProtocols(t *testing.T) {
	config := smolvm.VMConfig{ID: "web", PortForwards: []smolvm.PortForward{
		{HostPort: 53, GuestPort: 53}, {HostPort: 53, GuestPort: 53, Protocol: smolvm.UDP},
	}}.WithDefaults()
	if err := config.Validate(); err != nil {
		t.Error(err)
	}
	for i, want := range []string{"127.0.0.1:53 -> 53", "127.0.0.1:53 -> 53/udp"} {
		if got := config.PortForwards[i].String(); got != want {
			t.Errorf("forward is %q, want %q", got, want)
		}
	}
}
