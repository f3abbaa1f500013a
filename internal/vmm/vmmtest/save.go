package vmmtest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/smolvm/smolvm/internal/vmm"
)

// save: a guest that was saved goes on, and so does each that is restored from it, with
// the same memory and disk, and none sees what another writes.
func save(k *kit) {
	base := k.drive("base", "raw")
	g := k.boot(func(c *vmm.Config) { c.Drives = []vmm.Drive{k.overlay(base, "parent")} })
	saver := k.saver(g)
	g.run("word=remembered; echo remembered >/tmp/file; printf 'before\\n' | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null")

	disk := g.cfg.Drives[0]
	next := k.overlay(disk, "parent-next")
	switched := 0
	opts := k.saveOptions("saved")
	opts.Overlays = []string{next.Path}
	opts.Switched = func() error { switched++; return nil }
	saved, err := saver.Save(k.Context(), opts)
	if err != nil {
		k.Fatal(err)
	}
	if !saved.Switched || switched != 1 || saved.Held || saved.Pause <= 0 {
		k.Errorf("Saved = %+v, with %d calls of Switched", saved, switched)
	}
	k.Logf("the guest was held for %v", saved.Pause)

	// What the parent writes from now on is no concern of its children.
	g.run("word=changed; printf 'after \\n' | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null")
	memory := readFile(opts.Memory)
	for _, name := range []string{"child", "twin"} {
		child := k.restore(g.cfg, saved, opts, []vmm.Drive{k.overlay(disk, name)})
		got := child.run("echo $word; cat /tmp/file; head -n 1 /dev/vda; dd if=/dev/vda iflag=direct count=1 2>/dev/null | head -n 1")
		if want := "remembered\nremembered\nbefore\nbefore"; got != want {
			k.Errorf("the %s says %q, want %q", name, got, want)
		}
		child.run("word=mine; echo mine >/tmp/file; printf 'mine  \\n' | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null")
	}
	if got := g.run("echo $word; cat /tmp/file; head -n 1 /dev/vda"); got != "changed\nremembered\nafter " {
		k.Errorf("the parent says %q", got)
	}
	if readFile(opts.Memory) != memory {
		k.Error("restored guests write to the file of the saved memory")
	}
}

// saveHeld: a guest that is held when it is saved stays so, and what is restored from it
// runs; one that is to be held after it is, and can be told to go on.
func saveHeld(k *kit) {
	g := k.boot(nil)
	saver := k.saver(g)
	pauser, ok := g.Instance.(vmm.Pauser)
	if !ok {
		k.Skip("this backend can't pause VMs")
	}
	if err := pauser.Pause(k.Context()); err != nil {
		k.Fatal(err)
	}
	for _, name := range []string{"first", "second"} {
		opts := k.saveOptions(name)
		opts.Hold = true
		saved, err := saver.Save(k.Context(), opts)
		if err != nil {
			k.Fatal(err)
		}
		if want := name == "first"; saved.Held != want {
			k.Errorf("the %s time, Held = %v", name, saved.Held)
		}
		child := k.restore(g.cfg, saved, opts, nil)
		if got := child.run("echo awake"); got != "awake" {
			k.Errorf("a restored guest says %q", got)
		}
		if name == "second" {
			break
		}
		if err := pauser.Resume(k.Context()); err != nil {
			k.Fatal(err)
		}
		if got := g.run("echo awake"); got != "awake" {
			k.Errorf("the guest that was saved says %q", got)
		}
	}
	if err := pauser.Resume(k.Context()); err != nil {
		k.Fatal(err)
	}
	if got := g.run("echo awake"); got != "awake" {
		k.Errorf("the guest that was held when it was saved says %q", got)
	}
}

// saveFails: the guest goes on as if nothing had been, no file is left, and it can be
// saved after that.
func saveFails(k *kit) {
	base := k.drive("base", "raw")
	g := k.boot(func(c *vmm.Config) { c.Drives = []vmm.Drive{k.overlay(base, "parent")} })
	saver := k.saver(g)
	mustFail := func(ctx context.Context, what string, opts vmm.SaveOptions) error {
		k.Helper()
		files := openFiles(k)
		_, err := saver.Save(ctx, opts)
		if err == nil {
			k.Fatalf("%s: Save succeeds", what)
		}
		k.Logf("%s: %v", what, err)
		if now := openFiles(k); now != files {
			k.Errorf("%s: %d files are open, %d before", what, now, files)
		}
		if got := g.run("echo awake"); got != "awake" {
			k.Errorf("%s: the guest says %q", what, got)
		}
		return err
	}
	gone := func(what string, paths ...string) {
		k.Helper()
		for _, path := range paths {
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				k.Errorf("%s: %s is left: %v", what, path, err)
			}
		}
	}

	opts := k.saveOptions("nowhere")
	opts.State = filepath.Join(k.missing(), "state")
	_ = mustFail(k.Context(), "no place for the state", opts)
	gone("no place for the state", opts.Memory)

	opts = k.saveOptions("taken")
	if err := os.WriteFile(opts.State, []byte("another's"), 0o600); err != nil {
		k.Fatal(err)
	}
	_ = mustFail(k.Context(), "a state that is there", opts)
	gone("a state that is there", opts.Memory)
	if got := readFile(opts.State); got != "another's" {
		k.Errorf("another's file now holds %q", got)
	}

	opts = k.saveOptions("no-overlay")
	opts.Overlays = []string{k.missing()}
	_ = mustFail(k.Context(), "an overlay that is not there", opts)
	gone("an overlay that is not there", opts.Memory, opts.State)

	ctx, cancel := context.WithCancel(k.Context())
	cancel()
	opts = k.saveOptions("given-up")
	if err := mustFail(ctx, "given up", opts); !errors.Is(err, context.Canceled) {
		k.Errorf("given up: error is %v, want the cancellation", err)
	}
	gone("given up", opts.Memory, opts.State)

	opts = k.saveOptions("saved")
	opts.Overlays = []string{k.overlay(g.cfg.Drives[0], "next").Path}
	saved, err := saver.Save(k.Context(), opts)
	if err != nil {
		k.Fatalf("after failures: %v", err)
	}
	child := k.restore(g.cfg, saved, opts, []vmm.Drive{k.overlay(g.cfg.Drives[0], "child")})
	if got := child.run("echo awake"); got != "awake" {
		k.Errorf("a guest that was saved after failures says %q", got)
	}
}

// restoreFails: what can't be restored is an error that leaves nothing, not a VM.
func restoreFails(k *kit) {
	g := k.boot(nil)
	opts := k.saveOptions("saved")
	saved, err := k.saver(g).Save(k.Context(), opts)
	if err != nil {
		k.Fatal(err)
	}
	g.killed()
	if err := os.WriteFile(opts.State+".cut", []byte(readFile(opts.State)[:1<<10]), 0o600); err != nil {
		k.Fatal(err)
	}
	for name, from := range map[string]vmm.Restore{
		"no state":            {Memory: opts.Memory, State: k.missing()},
		"no memory":           {Memory: k.missing(), State: opts.State},
		"a state that is cut": {Memory: opts.Memory, State: opts.State + ".cut"},
		"no state at all":     {Memory: opts.Memory, State: os.DevNull},
	} {
		k.sub(name, func(k *kit) {
			from.Held = saved.Held
			ctx, cancel := context.WithTimeout(k.Context(), patience)
			defer cancel()
			err := k.mustFail(ctx, func(c *vmm.Config) { c.Restore = &from }, "")
			if ctx.Err() != nil {
				k.Errorf("it was only noticed when time was up: %v", err)
			}
		})
	}
}

func (k *kit) saver(g *guest) vmm.Saver {
	k.Helper()
	saver, ok := g.Instance.(vmm.Saver)
	if !ok {
		k.Skip("this backend can't save VMs")
	}
	return saver
}

func (k *kit) saveOptions(name string) vmm.SaveOptions {
	return vmm.SaveOptions{Memory: filepath.Join(k.dir, name+".memory"), State: filepath.Join(k.dir, name+".state")}
}

// restore starts a VM like another from what was saved of that.
func (k *kit) restore(like vmm.Config, saved vmm.Saved, opts vmm.SaveOptions, drives []vmm.Drive) *guest {
	k.Helper()
	return k.start(func(c *vmm.Config) {
		c.VCPUs, c.MemoryMiB, c.BootArgs = like.VCPUs, like.MemoryMiB, like.BootArgs
		c.Drives = drives
		c.Restore = &vmm.Restore{Memory: opts.Memory, State: opts.State, Held: saved.Held}
	})
}

// overlay makes an empty overlay of a drive.
func (k *kit) overlay(base vmm.Drive, name string) vmm.Drive {
	k.Helper()
	img, err := exec.LookPath("qemu-img")
	if err != nil {
		k.Skip("needs qemu-img")
	}
	path := filepath.Join(k.dir, name+".qcow2")
	// It takes the file's name as it is, but the backing file's as an option.
	backing := strings.ReplaceAll(base.Path, ",", ",,")
	cmd := exec.CommandContext(k.Context(), img, "create", "-q", "-f", "qcow2", "-o", "backing_file="+backing+",backing_fmt="+base.Format, path)
	if output, err := cmd.CombinedOutput(); err != nil {
		k.Fatalf("%v: %v: %s", cmd, err, output)
	}
	return vmm.Drive{Path: path, Format: "qcow2", Backing: append([]vmm.DiskFile{{Path: base.Path, Format: base.Format}}, base.Backing...)}
}
