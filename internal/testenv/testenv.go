// Package testenv is what tests of several packages need: a real image to boot, and
// a check that nothing is left behind. Only tests import it.
package testenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/cpio"
)

// cacheEnv names a directory in which images are kept from one run to the next.
const cacheEnv = "SMOLVM_TEST_CACHE"

// devEnv asks for what make test-dev runs: tests in images that take minutes to build where there is
// no KVM.
const devEnv = "SMOLVM_TEST_DEV"

// Dev reports whether such images may be built.
func Dev() bool { return os.Getenv(devEnv) != "" }

// buildTimeout bounds the building of the image, which downloads packages.
const buildTimeout = 10 * time.Minute

// Cache is the directory that all tests of this checkout share. Another checkout may have
// another agent, and so other images.
func Cache(t testing.TB) string {
	t.Helper()
	dir, err := cache()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func cache() (string, error) {
	dir := os.Getenv(cacheEnv)
	if dir == "" {
		root, err := moduleRoot()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(root, "bin", "test-cache")
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// RequireQEMU skips the test where QEMU is not installed, and in short mode.
func RequireQEMU(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("real VMs are left out in short mode")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil || os.Getenv(standInEnv) != "" {
		t.Skip("real VMs need qemu-system-x86_64")
	}
}

// Agent builds the agent, once in a test's process, and returns its path.
func Agent(t testing.TB) string {
	t.Helper()
	path, err := agentOnce()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var agentOnce = sync.OnceValues(func() (string, error) {
	home, err := cache()
	if err != nil {
		return "", err
	}
	path := filepath.Join(home, "smolvm-agent")
	if inBed() {
		return path, nil
	}
	dir, err := moduleRoot()
	if err != nil {
		return "", err
	}
	// A name of this process's own: others may build at the same time.
	temp := filepath.Join(home, fmt.Sprintf("smolvm-agent.%d", os.Getpid()))
	cmd := exec.CommandContext(context.Background(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", temp, "./cmd/smolvm-agent")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build agent: %w\n%s", err, out)
	}
	// If it is as it was, the old file stays, so that images need no new look.
	built, err := os.ReadFile(temp)
	if err != nil {
		return "", err
	}
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, built) {
		return path, os.Remove(temp)
	}
	return path, os.Rename(temp, path)
})

func moduleRoot() (string, error) {
	out, err := exec.CommandContext(context.Background(), "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find module: %w", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

// Images is a store that has the default image, shared by all tests. The test is
// skipped where that can't be made.
func Images(t testing.TB) string {
	t.Helper()
	if missing := missingTools(); len(missing) > 0 && !inBed() {
		t.Skip("real VMs need the default image, which is made with ", strings.Join(missing, ", "))
	}
	dir := filepath.Join(Cache(t), imagesDir())
	store, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout)
	defer cancel()
	if _, err := store.Ensure(ctx, recipe(t)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// missingTools are those that an image is made with and this host lacks.
func missingTools() []string {
	var missing []string
	for _, name := range []string{"apt-get", "apt-cache", "dpkg-deb", "mke2fs", "debugfs"} {
		if _, err := exec.LookPath(name); err == nil {
			continue
		}
		if _, err := os.Stat(filepath.Join("/usr/sbin", name)); err != nil {
			missing = append(missing, name)
		}
	}
	return missing
}

// Image is the default image.
func Image(t testing.TB) smolvm.Image {
	t.Helper()
	store, err := image.Open(Images(t))
	if err != nil {
		t.Fatal(err)
	}
	found, err := store.Get(context.Background(), smolvm.DefaultImage)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// SeedImages gives a data directory the shared images, and the kernel that they boot with.
func SeedImages(t testing.TB, dataDir string) {
	t.Helper()
	if err := os.MkdirAll(dataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := LinkShared(Shared(t), dataDir); err != nil {
		t.Fatal(err)
	}
}

// Shared returns what data directories of all tests share: a link's name, and what it leads to.
func Shared(t testing.TB) map[string]string {
	t.Helper()
	shared := map[string]string{"images": Images(t)}
	if kernels := kernels(t); kernels != "" {
		shared["kernels"] = kernels
	}
	return shared
}

// LinkShared gives a data directory what [Shared] has returned, but for what is there.
func LinkShared(shared map[string]string, dataDir string) error {
	for name, target := range shared {
		if err := os.Symlink(target, filepath.Join(dataDir, name)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// OwnImages gives a data directory a store of images of its own, with the default image: for a test
// that makes images that would stay among the shared ones.
func OwnImages(t testing.TB, dataDir string) {
	t.Helper()
	from := filepath.Dir(Image(t).KernelPath)
	images := filepath.Join(dataDir, "images")
	name := filepath.Join("names", smolvm.DefaultImage)
	to := filepath.Join(images, filepath.Base(from))
	if err := errors.Join(os.MkdirAll(to, 0o700), os.MkdirAll(filepath.Join(images, "names"), 0o700)); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		share(t, filepath.Join(from, file.Name()), filepath.Join(to, file.Name()))
	}
	share(t, filepath.Join(Images(t), name), filepath.Join(images, name))
	SeedImages(t, dataDir) // the kernel, if it is not the distribution's
}

// share makes a file appear in another place too, by a link where one can be made.
func share(t testing.TB, from, to string) {
	t.Helper()
	if os.Link(from, to) == nil {
		return
	}
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
}

// Kernel is the default image's kernel.
func Kernel(t testing.TB) string { t.Helper(); return Image(t).KernelPath }

// prologue is how an init script begins: with what every guest needs.
const prologue = `#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin
for module in $(sed -n 's/.*"path": "\(.*\)".*/\1/p' /lib/smolvm/modules.json); do
	insmod $module 2>/dev/null
done
`

// Initramfs makes an initramfs that runs a busybox shell script as its init, with the
// modules of the default image loaded: a guest without our agent.
func Initramfs(t testing.TB, script string) string {
	t.Helper()
	return InitramfsWith(t, script)
}

// InitramfsWith is Initramfs with programs of this module, by their packages, in /bin.
func InitramfsWith(t testing.TB, script string, programs ...string) string {
	t.Helper()
	files := map[string][]byte{}
	for _, program := range programs {
		files["bin/"+filepath.Base(program)] = build(t, program)
	}
	return InitramfsOf(t, script, files)
}

// InitramfsOf is Initramfs with programs, by their paths in the guest.
func InitramfsOf(t testing.TB, script string, programs map[string][]byte) string {
	t.Helper()
	base := Image(t)
	original, err := os.ReadFile(base.InitrdPath)
	if err != nil {
		t.Fatal(err)
	}
	// The kernel unpacks one archive after the other, so a second one replaces the
	// agent of the first.
	path := filepath.Join(t.TempDir(), "initramfs")
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_, writeErr := out.Write(original)
	archive := cpio.NewWriter(out)
	archive.Dir("bin", 0o755)
	archive.File("bin/busybox", 0o755, busybox(t, base))
	for _, path := range slices.Sorted(maps.Keys(programs)) {
		archive.File(path, 0o755, programs[path])
	}
	archive.File("init", 0o755, []byte(prologue+script))
	if err := errors.Join(writeErr, archive.Close(), out.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// Build returns a program of this module, by its package, as it runs in any guest.
func Build(t testing.TB, program string) []byte { t.Helper(); return build(t, program) }

// build builds a program of this module for a guest.
func build(t testing.TB, program string) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", program, err, out)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// busybox takes the program out of the default image's root file system.
func busybox(t testing.TB, base smolvm.Image) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "busybox")
	cmd := exec.CommandContext(t.Context(), "debugfs", "-R", "dump /bin/busybox "+path, base.RootfsPath)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if cmd.Err != nil {
		cmd.Path, cmd.Err = "/usr/sbin/debugfs", nil
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("debugfs: %v\n%s", err, out)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return program
}

// Processes lists the processes whose command line has a word, as "pid: command".
func Processes(word string) []string {
	var found []string
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		text, err := os.ReadFile(path)
		line := strings.ReplaceAll(string(text), "\x00", " ")
		if err == nil && strings.Contains(line, word) && filepath.Dir(path) != fmt.Sprintf("/proc/%d", os.Getpid()) {
			found = append(found, filepath.Base(filepath.Dir(path))+": "+line)
		}
	}
	return found
}

// NoProcesses fails a test that, at its end, has left processes whose command line has
// a word, such as the test's own directory.
func NoProcesses(t testing.TB, word string) {
	t.Helper()
	t.Cleanup(func() {
		for _, process := range Processes(word) {
			t.Errorf("left behind: process %s", process)
		}
	})
}

// Suspend stops a process by a signal, and returns when it has stopped.
func Suspend(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(text), ") ")
		if strings.HasPrefix(rest, "T") {
			return
		}
		<-time.After(time.Millisecond)
	}
}
