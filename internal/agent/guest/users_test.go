package guest

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// An image's files of accounts may be anything: none of it is waited for, or read without end.
func TestHostileAccounts(t *testing.T) {
	dir := t.TempDir()
	fifo, long := filepath.Join(dir, "fifo"), filepath.Join(dir, "long")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, dir, "/dev/zero", filepath.Join(dir, "nothing")} {
		if file, err := openAccounts(path); err == nil {
			_ = file.Close()
			t.Errorf("%s was opened", path)
		}
	}
	// A line as long as that of a group with thousands of members is one, and what follows it counts.
	text := "many:x:1:" + strings.Repeat("member,", 20_000) + "\nlast:x:7:\n"
	if err := os.WriteFile(long, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := openAccounts(long)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	if gid, ok := parseGID(file, "last"); !ok || gid != 7 {
		t.Errorf("the group behind a long line is %d, %v", gid, ok)
	}
}
