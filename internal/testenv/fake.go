package testenv

import (
	"context"
	"os"
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
	dir := t.TempDir()
	put := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	rootfs := make([]byte, fakeRootfs)
	copy(rootfs[0x438:], "\x53\xef") // looks like ext4 to a probe
	if err := os.MkdirAll(dataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := image.Open(filepath.Join(dataDir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = store.Build(context.Background(), image.Recipe{
		Name: smolvm.DefaultImage, Agent: put("agent", []byte("#!/bin/sh\n")),
		Kernel: put("kernel", imagetest.TinyKernel()), Rootfs: put("rootfs", rootfs),
	})
	if err != nil {
		t.Fatal(err)
	}
}

// StandIn puts a program of that name first in PATH, for the rest of the test. It does
// nothing: a fake VMM is looked for by another's name, and not run.
func StandIn(t testing.TB, name string) (path string) {
	t.Helper()
	dir := t.TempDir()
	path = filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho version 9.0.0\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	return path
}
