package manager_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/imagetest"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// putKernel puts a kernel into a data directory as a build does, for images to boot with.
func putKernel(t *testing.T, dataDir, version string, content []byte) {
	t.Helper()
	dir := filepath.Join(dataDir, "kernels", strings.Repeat("a", 32))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{
		filepath.Join(dir, "vmlinux"): string(content), filepath.Join(dir, "config"): "CONFIG_64BIT=y\n",
		filepath.Join(dir, "kernel.json"):                  `{"package":"linux-source-6.1","version":"` + version + `","sha256":"0123456789abcdef","source":"source.deb"}`,
		filepath.Join(dataDir, "kernels", "used.json"):     `{"kernel":"` + filepath.Base(dir) + `"}`,
		filepath.Join(dataDir, "kernels", "old", "config"): "",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// An image for which no kernel is named has the one that was built for images, which it tells, and
// stays what it is where that is elsewhere; prune keeps that kernel.
func TestImageWithKernelOfOurs(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	recipe := testenv.FakeRecipe(t, dir)
	kernel := append(imagetest.TinyKernel(), "ours"...)
	build := func(dataDir string) smolvm.Image {
		t.Helper()
		m, err := manager.Open(t.Context(), manager.Config{DataDir: dataDir, SocketDir: filepath.Join(dir, "run"), AgentPath: recipe.Agent})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = m.Close() }()
		built, err := m.BuildImage(t.Context(), smolvm.BuildOptions{Name: "mine", Rootfs: recipe.Rootfs})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.PruneImages(context.WithoutCancel(t.Context())); err != nil {
			t.Fatal(err)
		}
		return built
	}
	first := filepath.Join(dir, "first")
	putKernel(t, first, "6.1.1-1", kernel)
	built := build(first)
	if got, err := os.ReadFile(built.KernelPath); err != nil || !bytes.Equal(got, kernel) {
		t.Errorf("it has another kernel: %v", err)
	}
	if !strings.HasPrefix(built.Source, "linux-source-6.1 6.1.1-1 smolvm-0123456789ab, ") {
		t.Errorf("its source is %q", built.Source)
	}
	if left, err := filepath.Glob(filepath.Join(first, "kernels", "*", "config")); err != nil || len(left) != 1 || !strings.Contains(left[0], "aaaa") {
		t.Errorf("after pruning there are %q, %v", left, err)
	}

	second := filepath.Join(dir, "second")
	if err := os.Rename(first, second); err != nil {
		t.Fatal(err)
	}
	if moved := build(second); moved.Digest != built.Digest || !moved.CreatedAt.Equal(built.CreatedAt) {
		t.Errorf("where it was moved it was built anew: %+v", moved)
	}
	putKernel(t, second, "6.1.2-1", append(kernel, "newer"...))
	if newer := build(second); newer.Digest == built.Digest {
		t.Error("with a newer kernel it is the same image")
	}
}
