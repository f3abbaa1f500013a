package manager_test

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/qemu"
	"github.com/smolvm/smolvm/internal/vmm/traits"
	"github.com/smolvm/smolvm/internal/vmm/vmmfake"
	"github.com/smolvm/smolvm/manager"
)

// fakeEnv has shims run VMs by the fake VMM, which takes QEMU's name.
const fakeEnv = "SMOLVM_TEST_VMMFAKE"

// backends are what a shim of the tests can run VMs by.
func backends() []vmm.Backend {
	if os.Getenv(fakeEnv) != "" {
		return []vmm.Backend{vmmfake.New(vmmfake.Options{})}
	}
	return []vmm.Backend{qemu.New(qemu.Options{})}
}

// useFake makes the test's VMs those of the fake VMM, and returns the configuration of a
// Manager that can boot them.
func useFake(t testing.TB) manager.Config {
	t.Helper()
	t.Setenv(fakeEnv, "1")
	testenv.StandIn(t, traits.QEMUProgram(runtime.GOARCH))
	config := testConfig(t, tempDir(t))
	config.AgentPath = "" // the image is there
	testenv.FakeImages(t, config.DataDir)
	return config
}

// openFake opens a Manager whose VMs are run by the fake VMM: for what is the engine's own
// doing, and not QEMU's or the guest's. It checks at the test's end that nothing is left.
func openFake(t testing.TB) *manager.Manager {
	t.Helper()
	return openAt(t, useFake(t))
}

// openFakeFast is openFake with templates.
func openFakeFast(t testing.TB) *manager.Manager {
	t.Helper()
	config := useFake(t)
	config.Templates = manager.TemplateConfig{}
	return openAt(t, config)
}

// faulty gives the next starts of a VM such faults of the fake VMM's.
func faulty(t testing.TB, m *manager.Manager, id, faults string) {
	t.Helper()
	dir := filepath.Join(m.DataDir(), "vms", id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, vmmfake.FaultsFile), []byte(faults), 0o600); err != nil {
		t.Fatal(err)
	}
}
