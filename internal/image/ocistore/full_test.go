package ocistore

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

// A disk that is full in the middle of a pull is an error, and when there is room the pull goes on from
// there.
func TestPullOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("smolvm-test", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skip("no file system can be mounted here: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s, err := Open(dir, Limits{})
	must(t, err)
	registry := newServer(t)
	want := imageOf(t, 1, 3_000_000)
	ref := registry.push(t, want, "image")
	_, err = pull(t, s, ref)
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("pulled to a full disk: %v", err)
	}
	if _, err := s.Get(ref); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("the image is there: %v", err)
	}
	if blobs := files(t, s, "blobs"); len(blobs) > 2 { // the manifest and the configuration
		t.Errorf("blobs are there: %q", blobs)
	}
	must(t, unix.Mount("smolvm-test", dir, "tmpfs", unix.MS_REMOUNT, "size=20m"))
	registry.asked("")
	image, err := pull(t, s, ref)
	must(t, err)
	checkWhole(t, s, image, want)
	if ranges := registry.asked("bytes="); len(ranges) != 1 {
		t.Errorf("it asked for %q, and not for the rest", ranges)
	}
}
