package testenv

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/kernelbuild"
)

// kernelEnv names a kernel that `smolvm image kernel` has built, by the path that it prints: the
// guests of all tests boot with it. Empty: with the distribution's.
const kernelEnv = "SMOLVM_TEST_KERNEL"

// KernelOfOurs returns the kernel that guests boot with instead of the distribution's; empty: none.
func KernelOfOurs() string { return os.Getenv(kernelEnv) }

// kernelsOnce makes a store of kernels that has the one of [kernelEnv] and no other, once in a test's
// process. Empty: that asks for none.
var kernelsOnce = sync.OnceValues(func() (string, error) {
	path := KernelOfOurs()
	if path == "" {
		return "", nil
	}
	home, err := cache()
	if err != nil {
		return "", err
	}
	from, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	key := filepath.Base(from)
	dir := filepath.Join(home, "kernel-"+key)
	used, err := json.Marshal(map[string]string{"kernel": key})
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	if err := os.Symlink(from, filepath.Join(dir, key)); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "used.json"), used, 0o600)
})

// kernels returns a store of kernels that has the one of [kernelEnv]; empty: that asks for none.
func kernels(t testing.TB) string {
	t.Helper()
	dir, err := kernelsOnce()
	if err != nil {
		t.Fatalf("the kernel that %s names: %v", kernelEnv, err)
	}
	return dir
}

// recipe is that of the default image of tests.
func recipe(t testing.TB) image.Recipe {
	t.Helper()
	r := image.Recipe{Name: smolvm.DefaultImage, Agent: Agent(t)}
	if dir := kernels(t); dir != "" {
		kernel, _, err := (&kernelbuild.Store{Dir: dir}).Used()
		if err != nil {
			t.Fatalf("the kernel that %s names: %v", kernelEnv, err)
		}
		r.Kernel, r.KernelName = kernel.Path, kernel.Name
	}
	return r
}

// imagesDir returns the name of the directory with the shared images below the tests' cache. Images
// with another kernel are others.
func imagesDir() string {
	if path := KernelOfOurs(); path != "" {
		return "images-" + keyOf(path)
	}
	return "images"
}

// keyOf returns the key of a kernel, by which a store keeps it, from its path.
func keyOf(path string) string { return filepath.Base(filepath.Dir(path)) }
