package testenv

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

// FillDisk writes a file until there is no room for another byte.
func FillDisk(t testing.TB, path string) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	for block := make([]byte, 1<<20); len(block) > 0; {
		if _, err := file.Write(block); err != nil {
			block = block[:len(block)/2]
		}
	}
}

// UnixPair returns the two ends of a connection over a unix socket, which are closed at the
// test's end.
func UnixPair(t testing.TB) (dialed, accepted *net.UnixConn) {
	t.Helper()
	address := &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"}
	listener, err := net.ListenUnix("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	if dialed, err = net.DialUnix("unix", nil, address); err != nil {
		t.Fatal(err)
	}
	if accepted, err = listener.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = dialed.Close(), accepted.Close() })
	return dialed, accepted
}
