package manager_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/imagetest"
	"github.com/smolvm/smolvm/manager"
)

// withoutImage is a VM that needs no image to be created, and that only a fake VMM starts.
func withoutImage(t *testing.T, id string) smolvm.VMConfig {
	t.Helper()
	dir := t.TempDir()
	config := smolvm.VMConfig{ID: id, KernelPath: filepath.Join(dir, "kernel"), InitrdPath: filepath.Join(dir, "initrd")}
	err := errors.Join(os.WriteFile(config.KernelPath, imagetest.TinyKernel(), 0o600),
		os.WriteFile(config.InitrdPath, []byte(imagetest.Initramfs), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// Nothing more is made when the data directory takes more than it may, or too little is
// free; what is there can be listed and removed (L2).
func TestDiskBudget(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	open := func(budget, reserve int64) *manager.Manager {
		t.Helper()
		m, err := manager.Open(t.Context(), manager.Config{DataDir: dir, SocketDir: filepath.Join(dir, "run"), DiskBudget: budget, DiskReserve: reserve})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = m.Close() })
		return m
	}
	free := open(0, -1)
	if _, err := free.Create(t.Context(), withoutImage(t, "first"), smolvm.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// Holes don't count, and a file of two names counts once.
	disk := filepath.Join(dir, "disks", "old.qcow2")
	if err := errors.Join(
		os.WriteFile(disk, make([]byte, 3<<20), 0o600),
		os.Truncate(disk, 1<<40),
		os.Link(disk, filepath.Join(dir, "layers", "old.qcow2")),
	); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		budget, reserve int64
		want            []string // nil: there is room
	}{
		"no limit":        {0, -1, nil},
		"enough":          {50 << 20, -1, nil},
		"too much":        {3 << 20, -1, []string{"disks 3.0 MiB", "3.0 MiB are allowed", "SMOLVM_DISK_BUDGET", "remove VMs"}},
		"too little free": {0, 1 << 60, []string{"are free", dir, "SMOLVM_DISK_RESERVE"}},
	} {
		m := open(test.budget, test.reserve)
		id := "vm-" + strings.ReplaceAll(name, " ", "-")
		_, createErr := m.Create(t.Context(), withoutImage(t, id), smolvm.CreateOptions{})
		if test.want == nil {
			if createErr != nil {
				t.Errorf("%s: Create = %v", name, createErr)
			}
			continue
		}
		_, startErr := m.Start(t.Context(), "first", smolvm.StartOptions{})
		_, buildErr := m.BuildImage(t.Context(), smolvm.BuildOptions{Name: "x"})
		for verb, err := range map[string]error{"Create": createErr, "Start": startErr, "BuildImage": buildErr} {
			if verb == "BuildImage" && err != nil && strings.Contains(err.Error(), "smolvm-agent") {
				continue // this test's program has no agent
			}
			if !errors.Is(err, smolvm.ErrDiskBudget) {
				t.Errorf("%s: %s = %v", name, verb, err)
				continue
			}
			for _, text := range test.want {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%s: %s: %v lacks %q", name, verb, err, text)
				}
			}
		}
		if vm, err := m.Get(t.Context(), "first"); err != nil || vm.State != smolvm.StateCreated {
			t.Errorf("%s: the VM that was not started is %s (%v)", name, vm.State, err)
		}
	}
	full := open(1, 1<<60)
	vms, err := full.List(t.Context(), smolvm.ListOptions{})
	if err != nil || len(vms) == 0 {
		t.Errorf("List = %v, %v", vms, err)
	}
	for _, vm := range vms {
		if err := full.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	}
}

func TestDiskLimitsFromEnvironment(t *testing.T) {
	dir := tempDir(t)
	for _, test := range []struct{ budget, reserve, want string }{
		{"lots", "", "$SMOLVM_DISK_BUDGET: invalid size \"lots\""},
		{"", "-3", "$SMOLVM_DISK_RESERVE"},
		{"1T", "1M", ""},
		{"", "0", ""},
		{"", "999999T", "no room on the disk"},
	} {
		t.Setenv("SMOLVM_DISK_BUDGET", test.budget)
		t.Setenv("SMOLVM_DISK_RESERVE", test.reserve)
		m, err := manager.Open(t.Context(), manager.Config{DataDir: dir, SocketDir: filepath.Join(dir, "run")})
		if err == nil {
			_, err = m.Create(t.Context(), withoutImage(t, ""), smolvm.CreateOptions{})
			_ = m.Close()
		}
		switch {
		case test.want == "" && err != nil:
			t.Errorf("%+v: %v", test, err)
		case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
			t.Errorf("%+v: error is %v, want %q in it", test, err, test.want)
		}
	}
}
