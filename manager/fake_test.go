package manager_test

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/shim/program"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/qemu"
	"github.com/smolvm/smolvm/internal/vmm/vmmfake"
	"github.com/smolvm/smolvm/manager"
)

// fakeShim is the first argument of a shim that runs its VMs by the fake VMM, which takes
// QEMU's name.
const fakeShim = "fake-shim"

// resettingShim is fakeShim with VMs whose guest channel is reset when they are saved.
const resettingShim = "fake-shim-resets"

// beShim makes this process a shim, if it was started as one.
func beShim(role string) {
	backend := vmm.Backend(qemu.New(qemu.Options{}))
	switch role {
	case fakeShim:
		backend = vmmfake.New(vmmfake.Options{})
	case resettingShim:
		backend = vmmfake.New(vmmfake.Options{ResetsChannel: true})
	case "shim", shim.Argument: // as the smolvm program that it stands in for
	default:
		return
	}
	os.Args[1] = shim.Argument
	program.Main(backend)
}

// fakeMark is the name of a file beside the data directories whose VMs are fake. It holds the
// first argument of their shims.
const fakeMark = "fake"

// isFake reports whether a data directory's VMs are those of the fake VMM.
func isFake(dataDir string) bool {
	_, err := os.Stat(filepath.Join(filepath.Dir(dataDir), fakeMark))
	return err == nil
}

// shimCommandOf returns what becomes the shims of a data directory's VMs.
func shimCommandOf(dataDir string) ([]string, error) {
	self, err := os.Executable()
	if role, readErr := os.ReadFile(filepath.Join(filepath.Dir(dataDir), fakeMark)); readErr == nil {
		return []string{self, string(role)}, err
	}
	return []string{self, shimCommand}, err
}

// useFake makes the VMs of a new data directory those of the fake VMM, and returns the
// configuration of a Manager that can boot them. It changes nothing of the process's, so
// that such tests can run beside each other.
func useFake(t testing.TB) manager.Config { t.Helper(); return useShim(t, fakeShim) }

func useShim(t testing.TB, role string) manager.Config {
	t.Helper()
	dir := tempDir(t)
	if err := os.WriteFile(filepath.Join(dir, fakeMark), []byte(role), 0o600); err != nil {
		t.Fatal(err)
	}
	config := testConfig(t, dir)
	config.AgentPath = "" // the image is there
	testenv.FakeImages(t, config.DataDir)
	return config
}

// ownFiles makes the files of an image of one's own, each time of another one; see ownImage.
func ownFiles(t testing.TB, m *manager.Manager) {
	t.Helper()
	testenv.FakeRecipe(t, filepath.Dir(m.DataDir()))
}

// ownImage says how to build an image of the files that ownFiles has made.
func ownImage(m *manager.Manager, name string) smolvm.BuildOptions {
	dir := filepath.Dir(m.DataDir())
	return smolvm.BuildOptions{Name: name, Kernel: filepath.Join(dir, "kernel"), Rootfs: filepath.Join(dir, "rootfs")}
}

// fakeAgent is the agent of such an image; empty if ownFiles has made none. With one, nobody
// may ask for the default image: it would be built anew, as that has another.
func fakeAgent(dataDir string) string {
	path := filepath.Join(filepath.Dir(dataDir), "agent")
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}

// buildOwn builds an image of one's own, named mine.
func buildOwn(t testing.TB, m *manager.Manager) smolvm.Image {
	t.Helper()
	builder, err := manager.Open(t.Context(), manager.Config{DataDir: m.DataDir(), SocketDir: m.SocketDir(), AgentPath: fakeAgent(m.DataDir())})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = builder.Close() }()
	built, err := builder.BuildImage(t.Context(), ownImage(m, "mine"))
	if err != nil {
		t.Fatal(err)
	}
	return built
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

// fakeVMs is a kind of fake VMs.
type fakeVMs struct{ shim string }

// open is openFake with VMs of that kind.
func (f fakeVMs) open(t testing.TB) *manager.Manager {
	t.Helper()
	return openAt(t, useShim(t, f.shim))
}

// openFast is openFakeFast with VMs of that kind.
func (f fakeVMs) openFast(t testing.TB) *manager.Manager {
	t.Helper()
	config := useShim(t, f.shim)
	config.Templates = manager.TemplateConfig{}
	return openAt(t, config)
}

// onEachChannel runs a test with fake VMs whose guest channel survives that they are saved, and
// with those whose channel does not.
func onEachChannel(t *testing.T, test func(*testing.T, fakeVMs)) {
	t.Helper()
	t.Parallel()
	for name, role := range map[string]string{"channel stays": fakeShim, "channel is reset": resettingShim} {
		t.Run(name, func(t *testing.T) { test(t, fakeVMs{role}) })
	}
}

// onSmallDisk gives a data directory a file system of its own, of a size as mount(8) takes it.
// The images are elsewhere.
func onSmallDisk(t testing.TB, config manager.Config, size string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system takes root")
	}
	images, elsewhere := filepath.Join(config.DataDir, "images"), filepath.Join(filepath.Dir(config.DataDir), "images")
	if err := os.Rename(images, elsewhere); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", config.DataDir, "tmpfs", 0, "mode=700,size="+size); err != nil {
		t.Skip("mounting is not allowed here: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(config.DataDir, unix.MNT_DETACH) })
	if err := os.Symlink(elsewhere, images); err != nil {
		t.Fatal(err)
	}
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
