package vmmtest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm"
)

// leavesNothing: a VM that has ended has no file open in this process, and no
// goroutine.
func leavesNothing(k *kit) {
	cycle := func() {
		link, theirs := linkPair(k)
		g := k.boot(func(c *vmm.Config) {
			if k.assets.SkipLink == "" {
				c.NIC = &vmm.NIC{MAC: guestMAC, Link: theirs}
			}
		})
		g.killed()
		_, _ = link.Close(), theirs.Close()
		for range g.lines { // its reader ends
		}
		_ = g.channel.Close() // which is ours
	}
	cycle() // what is opened once for good is open then
	files, goroutines := openFiles(k), runtime.NumGoroutine()
	cycle()
	if now := openFiles(k); now.differ(files) {
		k.Errorf("open after a VM's end: %q; before its start: %q", now, files)
	}
	// A goroutine that has closed a channel may take a moment to end.
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.After(patience)
	for runtime.NumGoroutine() > goroutines {
		select {
		case <-tick.C:
		case <-limit:
			stacks := make([]byte, 1<<20)
			k.Fatalf("%d goroutines after a VM's end, %d before its start:\n%s",
				runtime.NumGoroutine(), goroutines, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// openFiles lists the files that this process has open, but for pipes: Go keeps those that it
// splices by, and drops them when it likes.
func openFiles(k *kit) fileList {
	k.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		k.Fatal(err)
	}
	var files fileList
	for _, entry := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil && !strings.HasPrefix(target, "pipe:") {
			files = append(files, target)
		}
	}
	return files
}

// fileList lists open files.
type fileList []string

// differ reports whether there are more or fewer of them than before.
func (f fileList) differ(before fileList) bool { return len(f) != len(before) }

// startFails: each failure says why, and leaves nothing.
func startFails(k *kit) {
	// In each case want is in the error's text.
	cases := map[string]struct {
		edit func(k *kit, c *vmm.Config)
		want string
	}{
		"no kernel": {func(k *kit, c *vmm.Config) { c.Kernel = k.missing() }, "missing"},
		"no initrd": {func(k *kit, c *vmm.Config) { c.Initrd = k.missing() }, "missing"},
		"no drive": {
			func(k *kit, c *vmm.Config) { c.Drives = []vmm.Drive{{Path: k.missing(), Format: "raw"}} }, "missing",
		},
		"no place for the console": {
			func(k *kit, c *vmm.Config) { c.ConsolePath = filepath.Join(k.missing(), "console") }, "missing",
		},
		"no place for the log": {
			func(k *kit, c *vmm.Config) { c.LogPath = filepath.Join(k.missing(), "log") }, "missing",
		},
		"a VMM that fails": {
			func(k *kit, c *vmm.Config) { c.Binary = k.program("echo out of paper >&2; exit 3") }, "out of paper",
		},
		"a VMM that ends at once": {
			func(k *kit, c *vmm.Config) { c.Binary = k.program("exit 3") }, "exit status 3",
		},
		"a VMM that is no program": {func(_ *kit, c *vmm.Config) { c.Binary = c.Kernel }, "vmlinux"},
	}
	for name, c := range cases {
		k.sub(name, func(k *kit) {
			_ = k.mustFail(k.Context(), func(cfg *vmm.Config) { c.edit(k, cfg) }, c.want)
		})
	}
	k.sub("a VMM that is not there", func(k *kit) {
		err := k.mustFail(k.Context(), func(c *vmm.Config) { c.Binary = k.missing() }, "missing")
		if _, ok := errors.AsType[*smolvm.PrerequisiteError](err); !ok {
			k.Errorf("error is %T, want a PrerequisiteError", err)
		}
	})
	k.sub("a VMM that never answers", func(k *kit) {
		fifo := filepath.Join(k.root, "fifo")
		if err := unix.Mkfifo(fifo, 0o600); err != nil {
			k.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(k.Context(), 100*time.Millisecond)
		defer cancel()
		err := k.mustFail(ctx, func(c *vmm.Config) { c.Binary = k.program("read -r _ <" + fifo) }, "")
		if !errors.Is(err, context.DeadlineExceeded) {
			k.Errorf("error is %v, want the deadline's", err)
		}
	})
	k.sub("a call that was given up", func(k *kit) {
		ctx, cancel := context.WithCancel(k.Context())
		cancel()
		if err := k.mustFail(ctx, nil, ""); !errors.Is(err, context.Canceled) {
			k.Errorf("error is %v, want the cancellation", err)
		}
	})
}

// sub runs a case of a case, with directories of its own.
func (k *kit) sub(name string, run func(*kit)) {
	k.Run(name, func(t *testing.T) { run(newKit(t, k.backend, k.assets, k.initrd)) })
}

// missing is the path of nothing.
func (k *kit) missing() string { return filepath.Join(k.dir, "missing") }

// mustFail checks that Start fails, says what it should, and leaves nothing.
func (k *kit) mustFail(ctx context.Context, edit func(*vmm.Config), want string) error {
	k.Helper()
	cfg := k.config(edit)
	files := openFiles(k)
	instance, err := k.backend.Start(ctx, cfg)
	if err == nil {
		_ = instance.Kill(k.Context())
		k.Fatal("Start succeeds")
	}
	k.Log(err)
	if instance != nil {
		k.Errorf("Start returns %v beside its error", instance)
	}
	if !strings.Contains(err.Error(), want) {
		k.Errorf("error lacks %q: %v", want, err)
	}
	if now := openFiles(k); now.differ(files) {
		k.Errorf("open after a start that failed: %q; before it: %q", now, files)
	}
	k.checkProcesses()
	return err
}

// program makes a program in place of the VMM.
func (k *kit) program(script string) string {
	k.Helper()
	path := filepath.Join(k.root, "vmm")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		k.Fatal(err)
	}
	return path
}
