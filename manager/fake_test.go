package manager_test

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/shim/program"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker"
	"github.com/smolvm/smolvm/internal/vmm/qemu"
	"github.com/smolvm/smolvm/internal/vmm/traits"
	"github.com/smolvm/smolvm/internal/vmm/vmmfake"
	"github.com/smolvm/smolvm/manager"
)

// kind is what runs the VMs of a data directory: the first argument of a shim of that kind. All
// have QEMU's name.
type kind string

// Kinds. Those that are raw can use raw disks only. The fake one of them can't switch disks either,
// and resets the guest channel when a VM is saved, as Firecracker does.
const (
	realKind    = kind(shim.Argument)
	fakeKind    = kind("fake-shim")
	rawFakeKind = kind("raw-fake-shim")
	rawRealKind = kind("raw-shim")
)

// fakeKinds are those with the fake VMM, for tests of what depends on the kind of disks, or on
// what becomes of the guest channel.
var fakeKinds = map[string]kind{"qcow2": fakeKind, "raw": rawFakeKind}

// rawQEMU is QEMU that says that it can use raw disks only.
type rawQEMU struct{ vmm.Backend }

func (rawQEMU) Traits() vmm.Traits {
	declared := traits.QEMU()
	declared.DiskFormats = []string{disk.Raw}
	return declared
}

// isFake reports whether the VMM is the fake one.
func (k kind) isFake() bool { return k == fakeKind || k == rawFakeKind }

// isRaw reports whether the VMs have raw disks.
func (k kind) isRaw() bool { return k == rawFakeKind || k == rawRealKind }

// format is that of the VMs' own disks.
func (k kind) format() string {
	if k.isRaw() {
		return disk.Raw
	}
	return disk.QCOW2
}

// beShim makes this process a shim, if it was started as one.
func beShim(role string) {
	backend := vmm.Backend(qemu.New(qemu.Options{}))
	switch kind(role) {
	case fakeKind:
		backend = vmmfake.New(vmmfake.Options{})
	case rawFakeKind:
		backend = vmmfake.New(vmmfake.Options{RawOnly: true, ResetsChannel: true})
	case rawRealKind:
		backend = rawQEMU{backend}
	case "shim", realKind: // as the smolvm program that it stands in for
	default:
		return
	}
	os.Args[1] = shim.Argument
	program.Main(backend, firecracker.New(firecracker.Options{}))
}

// kindMark is the name of a file beside a data directory that has the kind of its VMs.
const kindMark = "kind"

// kindOf returns the kind of a data directory's VMs.
func kindOf(dataDir string) kind {
	text, err := os.ReadFile(filepath.Join(filepath.Dir(dataDir), kindMark))
	if err != nil {
		return realKind
	}
	return kind(text)
}

// as gives a Manager's VMs their kind.
func as(config manager.Config) (manager.Config, error) {
	self, err := os.Executable()
	k := kindOf(config.DataDir)
	config.ShimCommand = []string{self, string(k)}
	if k.isRaw() {
		config = manager.WithBackends(config, rawQEMU{}.Traits())
	}
	return config, err
}

// setKind makes the VMs of a new data directory in dir those of a kind.
func setKind(t testing.TB, dir string, k kind) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, kindMark), []byte(k), 0o600); err != nil {
		t.Fatal(err)
	}
}

// useFake makes the VMs of a new data directory those of the fake VMM, and returns the
// configuration of a Manager that can boot them. It changes nothing of the process's, so
// that such tests can run beside each other.
func useFake(t testing.TB) manager.Config {
	t.Helper()
	return useFakeKind(t, fakeKind)
}

// useFakeKind is useFake with VMs of a kind.
func useFakeKind(t testing.TB, k kind) manager.Config {
	t.Helper()
	return useFakeIn(t, tempDir(t), k)
}

// useFakeIn is useFakeKind with a new data directory in dir.
func useFakeIn(t testing.TB, dir string, k kind) manager.Config {
	t.Helper()
	setKind(t, dir, k)
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

// openFakeKind is openFake with VMs of a kind.
func openFakeKind(t testing.TB, k kind) *manager.Manager {
	t.Helper()
	return openAt(t, useFakeKind(t, k))
}

// eachDisk runs a test with VMs of the fake VMM that have qcow2 disks, and with such that have
// raw ones.
func eachDisk(t *testing.T, test func(t *testing.T, k kind)) {
	t.Helper()
	for name, k := range fakeKinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, k)
		})
	}
}

// openFakeFast is openFake with templates.
func openFakeFast(t testing.TB) *manager.Manager {
	t.Helper()
	return openFakeFastKind(t, fakeKind)
}

// openFakeFastKind is openFakeFast with VMs of a kind.
func openFakeFastKind(t testing.TB, k kind) *manager.Manager {
	t.Helper()
	config := useFakeKind(t, k)
	config.Templates = manager.TemplateConfig{}
	return openAt(t, config)
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
