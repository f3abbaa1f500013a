package hostdir_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/fuserelay"
	"github.com/smolvm/smolvm/internal/hostdir"
)

// mountHere mounts a directory by this host's kernel, as a guest's does it.
func mountHere(t testing.TB, dir string, opts hostdir.Options) (target string) {
	t.Helper()
	target = t.TempDir()
	fs, err := fuserelay.Mount(target, fuserelay.Options{ReadOnly: opts.ReadOnly, Source: "test"})
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENODEV) {
		t.Skip("file systems of FUSE can't be mounted here:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	served, err := hostdir.Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := socketPair(t)
	done := make(chan error, 2)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { done <- served.Serve(ctx, ours) }()
	go func() { _ = fs.Relay(theirs); done <- nil }()
	if err := fs.Probe(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fs.Abort(); err != nil {
			t.Error(err)
		}
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		_ = theirs.Close()
		if err := served.Close(); err != nil {
			t.Error(err)
		}
	})
	return target
}

func socketPair(t testing.TB) (ours, theirs net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "pair")
		conns[i], err = net.FileConn(file)
		_ = file.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	return conns[0], conns[1]
}

// run runs a line of shell in a directory.
func run(t testing.TB, dir, line string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// The shell changes its directory by itself: this process serves it, and can't while it forks one
	// that waits for it.
	cmd := exec.CommandContext(ctx, "sh", "-ec", "cd \"$0\"\n"+line, dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
}

// What programs do works, and is there on the other side.
func TestPOSIX(t *testing.T) {
	dir := t.TempDir()
	at := mountHere(t, dir, hostdir.Options{})
	for name, test := range map[string]struct{ line, check string }{
		"write":            {"echo hello > a; cat a", "test $(cat a) = hello"},
		"append":           {"echo 1 > b; echo 2 >> b", "test $(wc -l < b) = 2"},
		"truncate":         {"echo 12345 > c; truncate -s 2 c; test $(stat -c %s c) = 2", "test $(cat c) = 12"},
		"mode":             {"echo > d; chmod 750 d; test $(stat -c %a d) = 750", "test $(stat -c %a d) = 750"},
		"set-id":           {"echo > e; chmod 6755 e; test $(stat -c %a e) = 755", "test $(stat -c %a e) = 755"},
		"owner":            {"echo > f; chown 1:2 f; test $(stat -c %u:%g f) = 0:0", "test $(stat -c %u f) = $(id -u)"},
		"dirs":             {"mkdir -p g/h/i; rmdir g/h/i; test ! -e g/h/i", "test -d g/h"},
		"rename":           {"echo x > j; echo y > k; mv j k; test ! -e j; test $(cat k) = x", "test $(cat k) = x"},
		"links":            {"echo x > l; ln l m; ln -s /etc/passwd n; test $(stat -c %h m) = 2; test $(readlink n) = /etc/passwd", "test $(readlink n) = /etc/passwd"},
		"open and removed": {"exec 3<> o; rm o; echo x >&3; test $(stat -L -c %s /proc/self/fd/3) = 2", "test ! -e o"},
		"fifo":             {"mkfifo p; (echo x > p &); test $(cat p) = x", "test -p p"},
		"device":           {"! mknod q c 1 3 2>/dev/null", "test ! -e q"},
		"times":            {"touch -d @1000000000 r; test $(stat -c %Y r) = 1000000000", "test $(stat -c %Y r) = 1000000000"},
		"lists":            {"mkdir s; cd s; seq 3000 | xargs touch; test $(ls | wc -l) = 3000; test $(ls -l | wc -l) = 3001", "test $(ls s | wc -l) = 3000"},
		"large":            {"dd if=/dev/urandom of=t bs=1M count=5 2>/dev/null; cp t u; cmp t u", "cmp t u"},
		"sync":             {"dd if=/dev/zero of=v bs=4k count=4 conv=fsync 2>/dev/null; sync -f v", "test $(stat -c %s v) = 16384"},
		"lock":             {"flock w true", "test -e w"},
		"access":           {"echo > x; test ! -x x; chmod +x x; test -x x", "test -x x"},
		"program":          {"printf '#!/bin/sh\nexit 0\n' > y; chmod +x y; ./y", "test -x y"},
		"room":             {"test $(stat -f -c %b .) -gt 0", "true"},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, at, test.line)
			run(t, dir, test.check)
		})
	}
}

// What the host changes is what the next open sees, whatever the kernel was told before.
func TestHostChanges(t *testing.T) {
	dir := t.TempDir()
	at := mountHere(t, dir, hostdir.Options{})
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(dir+"/"+name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		text, err := os.ReadFile(at + "/" + name)
		if err != nil {
			return err.(*os.PathError).Err.Error() //nolint:errorlint,forcetypeassert // as documented
		}
		return string(text)
	}
	if err := os.Mkdir(dir+"/d", 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		text := strings.Repeat("x", i+1)
		write("d/a", text)
		if got := read("d/a"); got != text {
			t.Fatalf("after a write it reads %q, want %q", got, text)
		}
		write("d/b", "other "+text)
		if err := os.Rename(dir+"/d/b", dir+"/d/a"); err != nil {
			t.Fatal(err)
		}
		if got := read("d/a"); got != "other "+text {
			t.Fatalf("after a rename it reads %q", got)
		}
		// What is as long as before, too.
		write("d/a", "OTHER "+text)
		if got := read("d/a"); got != "OTHER "+text {
			t.Fatalf("after a write of equal length it reads %q", got)
		}
		if err := os.Remove(dir + "/d/a"); err != nil {
			t.Fatal(err)
		}
		if got := read("d/a"); got != unix.ENOENT.Error() {
			t.Fatalf("after a removal it reads %q", got)
		}
	}
	// Attributes and names are told of soon.
	write("d/c", "c")
	run(t, at, "ls -l d >/dev/null; stat d/c >/dev/null")
	if err := errors.Join(os.Chmod(dir+"/d/c", 0o600), os.Rename(dir+"/d", dir+"/e")); err != nil {
		t.Fatal(err)
	}
	run(t, at, "for i in $(seq 50); do test -e d || break; sleep 0.1; done; test ! -e d; test $(stat -c %a e/c) = 600")
}

// Both sides write at once, and neither gets in the other's way.
func TestBothWrite(t *testing.T) {
	dir := t.TempDir()
	at := mountHere(t, dir, hostdir.Options{})
	job := "i=0; while test $i -lt 100; do mkdir -p w/$1; echo $i >w/$1/f; mv w/$1/f w/$1/g; ls -l w >/dev/null 2>&1 || true; cat w/*/g >/dev/null 2>&1 || true; rm -r w/$1; i=$((i+1)); done"
	errs := make(chan error, 4)
	for i, place := range []string{at, dir, at, dir} {
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, "sh", "-ec", "cd \"$0\"\n"+job, place, strconv.Itoa(i))
			out, err := cmd.CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			errs <- err
		}()
	}
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	run(t, at, "test -z \"$(ls w)\"")
}
