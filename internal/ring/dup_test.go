package ring_test

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// dup makes the file to the same as the file from.
func dup(t *testing.T, from, to *os.File) {
	t.Helper()
	if err := unix.Dup3(int(from.Fd()), int(to.Fd()), unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
}
