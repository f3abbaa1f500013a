package manager_test

import (
	"errors"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

// What a VM takes of the host is known while it runs, also while it is paused.
func TestUsage(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	if _, err := m.Usage(t.Context(), "nosuch"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("a VM that is not there: %v", err)
	}
	vm := mustCreate(t, m, smolvm.VMConfig{})
	if _, err := m.Usage(t.Context(), vm.ID); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("a VM that does not run: %v", err)
	}
	if _, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Pause(t.Context(), vm.ID); err != nil {
		t.Fatal(err)
	}
	usage, err := m.Usage(t.Context(), vm.ID)
	if err != nil || usage.Memory == 0 || usage.Disk != nil || usage.Network == nil { // the fake counts no reads
		t.Errorf("usage is %+v, %v", usage, err)
	}
}

// hasUsed checks that what a VM's guest does is counted.
func hasUsed(t *testing.T, m *manager.Manager, id string) {
	t.Helper()
	before, err := m.Usage(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	sh(t, m, id, "dd if=/dev/zero of=/root/block bs=64k count=16 conv=fsync; ping -c 1 -W 5 $(ip route | awk '/^default/ {print $3}') || true")
	after, err := m.Usage(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if after.Disk.Written < before.Disk.Written+1<<20 || after.Network.Sent <= before.Network.Sent ||
		after.CPUTime < before.CPUTime || after.Memory < 1<<20 {
		t.Errorf("after 1 MiB was written, usage has gone from %+v to %+v (disk %+v, %+v; network %+v, %+v)",
			before, after, before.Disk, after.Disk, before.Network, after.Network)
	}
}
