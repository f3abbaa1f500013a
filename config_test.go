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

// The host name that follows from an id is one, and a bad id is one mistake.
func TestHostnameOfID(t *testing.T) {
	config := smolvm.VMConfig{ID: "a_b__c"}.WithDefaults()
	if err := config.Validate(); err != nil || config.Hostname != "a-b--c" {
		t.Errorf("host name %q: %v", config.Hostname, err)
	}
	var invalid *smolvm.ValidationError
	err := smolvm.VMConfig{ID: "Web_1"}.WithDefaults().Validate()
	if !errors.As(err, &invalid) || len(invalid.Fields) != 1 || invalid.Fields[0].Field != "id" {
		t.Errorf("a bad id: %v", err)
	}
	err = smolvm.VMConfig{ID: "web", Hostname: "web_1"}.WithDefaults().Validate()
	if !errors.As(err, &invalid) || invalid.Fields[0].Field != "hostname" {
		t.Errorf("a bad host name: %v", err)
	}
}

func TestLabels(t *testing.T) {
	long := strings.Repeat("a", 64)
	for label, want := range map[[2]string]bool{
		{"a", ""}: true, {"A.b_c-9", "any text, äöü"}: true, {"example.com/job", "17"}: true, {long[:63], strings.Repeat("v", 256)}: true,
		{"", ""}: false, {"a b", ""}: false, {"-a", ""}: false, {"a-", ""}: false, {"/a", ""}: false, {"a/", ""}: false,
		{"A.com/a", ""}: false, {"a/b/c", ""}: false, {long, ""}: false, {"a", strings.Repeat("v", 257)}: false,
		{"a", "two\nlines"}: false, {"a", "\x1b[2J"}: false, {"a", "\xff"}: false, {"a\n", ""}: false,
	} {
		if err := smolvm.ValidateLabel(label[0], label[1]); (err == nil) != want {
			t.Errorf("label %q: %v", label, err)
		}
	}
	labels := map[string]string{}
	for i := range smolvm.MaxLabels + 1 {
		labels[fmt.Sprint(i)] = ""
	}
	if err := (smolvm.VMConfig{ID: "web", Labels: labels}).WithDefaults().Validate(); err == nil {
		t.Errorf("%d labels are taken", len(labels))
	}
}

// Names of variables are as people mean them (A1). What a shell exports of its
// functions, as in BASH_FUNC_f%%, is a name as well.
func TestCommandValidate(t *testing.T) {
	for _, variable := range []string{"A=", "a.b=1", "BASH_FUNC_f%%=() { :; }", "Ä=1", "A=b=c"} {
		if err := (smolvm.Command{Args: []string{"true"}, Env: []string{variable}}).Validate(); err != nil {
			t.Errorf("%q: %v", variable, err)
		}
	}
	for _, variable := range []string{"A", "=1", "BAD NAME=1", "BAD\nNAME=1", "A\tB=1", "A=\x00", "A\x00=1"} {
		var invalid *smolvm.ValidationError
		if err := (smolvm.Command{Args: []string{"true"}, Env: []string{variable}}).Validate(); !errors.As(err, &invalid) {
			t.Errorf("%q: %v", variable, err)
		}
	}
	for _, args := range [][]string{nil, {"a\x00b"}} {
		if err := (smolvm.Command{Args: args}).Validate(); err == nil {
			t.Errorf("arguments %q are taken", args)
		}
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
		"a": true, "0": true, "web-1": true, "a--b": true, "a_b": true, "a_-b": true, strings.Repeat("a", 64): true, smolvm.NewID(): true,
		"": false, "-a": false, "a-": false, "A": false, "_a": false, "a_": false, "a.b": false, "a/b": false, "..": false,
		"ä": false, "a\n": false, strings.Repeat("a", 65): false,
	} {
		if err := smolvm.ValidateID(id); (err == nil) != want {
			t.Errorf("id %q: %v", id, err)
		}
	}
}

func TestValidate(t *testing.T) {
	for field, edit := range map[string]func(*smolvm.VMConfig){
		"id":            func(c *smolvm.VMConfig) { c.ID = "A" },
		"vcpus":         func(c *smolvm.VMConfig) { c.VCPUs = 33 },
		"memory_mib":    func(c *smolvm.VMConfig) { c.MemoryMiB = 127 },
		"backend":       func(c *smolvm.VMConfig) { c.Backend = "no/such" },
		"initrd_path":   func(c *smolvm.VMConfig) { c.InitrdPath = "/i" },
		"image":         func(c *smolvm.VMConfig) { c.KernelPath, c.RootfsPath = "/k", "/r" },
		"ready":         func(c *smolvm.VMConfig) { c.Ready = "soon" },
		"boot_args":     func(c *smolvm.VMConfig) { c.BootArgs = "a\nb" },
		"ttl_ms":        func(c *smolvm.VMConfig) { c.TTL = -1 },
		"disk_mode":     func(c *smolvm.VMConfig) { c.DiskMode = smolvm.DiskShared },
		"disk_size_mib": func(c *smolvm.VMConfig) { c.DiskSizeMiB = -1 },
		"drives":        func(c *smolvm.VMConfig) { c.Drives = make([]smolvm.Drive, 26) },
		"drives[0].backing": func(c *smolvm.VMConfig) {
			c.Drives = []smolvm.Drive{{Path: "a", Backing: []smolvm.DiskFile{{Path: "b", Format: smolvm.FormatRaw}}}}
		},
		"drives[0].backing[0].format": func(c *smolvm.VMConfig) {
			c.Drives = []smolvm.Drive{{Path: "a", Format: smolvm.FormatQCOW2, Backing: []smolvm.DiskFile{{Path: "b"}}}}
		},
		"drives[0].backing[1].path": func(c *smolvm.VMConfig) {
			c.Drives = []smolvm.Drive{{Path: "a", Format: smolvm.FormatQCOW2, Backing: []smolvm.DiskFile{{Path: "b", Format: smolvm.FormatQCOW2}, {Format: smolvm.FormatRaw}}}}
		},
		"rootfs_backing":        func(c *smolvm.VMConfig) { c.RootfsBacking = []smolvm.DiskFile{{Path: "b", Format: smolvm.FormatRaw}} },
		"disk_bytes_per_second": func(c *smolvm.VMConfig) { c.DiskBytesPerSecond = smolvm.MinDiskBytesPerSecond - 1 },
		"disk_iops":             func(c *smolvm.VMConfig) { c.DiskIOPS = -1 },
		"drives[0].path":        func(c *smolvm.VMConfig) { c.Drives = []smolvm.Drive{{}} },
		"env":                   func(c *smolvm.VMConfig) { c.Env = map[string]string{"a b": ""} },
		"labels":                func(c *smolvm.VMConfig) { c.Labels = map[string]string{"a b": ""} },
		"hostname":              func(c *smolvm.VMConfig) { c.Hostname = "a b" },
		"authorized_keys[0]":    func(c *smolvm.VMConfig) { c.AuthorizedKeys = []string{"key"} },
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
	if want := "backend qemu can't run on this host: qemu: not found (runs the VMs); fix: apt-get install qemu"; missing.Error() != want {
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
