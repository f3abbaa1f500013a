package testenv

import (
	"context"
	"crypto/rand"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/imagetest"
)

// fakeRootfs is the size of the fake image's root file system, in bytes.
const fakeRootfs = 4 << 20

// FakeImages gives a data directory a default image that only a fake VMM boots: a kernel, an
// agent and a file system that are none. It takes a few milliseconds.
func FakeImages(t testing.TB, dataDir string) {
	t.Helper()
	if err := os.MkdirAll(dataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := image.Open(filepath.Join(dataDir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	recipe := FakeRecipe(t, t.TempDir())
	recipe.Name = smolvm.DefaultImage
	if _, err = store.Build(context.Background(), recipe); err != nil {
		t.Fatal(err)
	}
}

// FakeRecipe makes the files of an image that only a fake VMM boots. Each time they are those
// of another image.
func FakeRecipe(t testing.TB, dir string) image.Recipe {
	t.Helper()
	put := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	rootfs := make([]byte, fakeRootfs)
	copy(rootfs, rand.Text())
	copy(rootfs[0x438:], "\x53\xef") // looks like ext4 to a probe
	return image.Recipe{
		Agent:  put("agent", []byte("#!/bin/sh\n")),
		Kernel: put("kernel", imagetest.TinyKernel()),
		Rootfs: put("rootfs", rootfs),
	}
}

// standInEnv names the directory with programs that stand in for those which the host lacks.
const standInEnv = "SMOLVM_TEST_STANDIN"

// standIn puts a program in PATH that does nothing, if there is none of that name: a fake VMM
// is looked for by another's name, and not run.
func standIn(dir, name string) error {
	if _, err := exec.LookPath(name); err == nil {
		return nil
	}
	err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho version 9.0.0\n"), 0o700)
	return errors.Join(err,
		os.Setenv("PATH", os.Getenv("PATH")+string(os.PathListSeparator)+dir),
		os.Setenv(standInEnv, dir))
}
