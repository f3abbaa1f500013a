package vmmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/smolvm/smolvm/internal/vmm"
)

// save: a guest that was saved is held until it is released, and goes on then; so does each
// that is restored from it, with the same memory, and none sees what another writes.
func save(k *kit) {
	g := k.boot(nil)
	saver := k.saver(g)
	g.run("word=remembered; echo remembered >/tmp/file")
	opts := k.saveOptions("saved")
	hold, err := saver.Save(k.Context(), opts)
	if err != nil {
		k.Fatal(err)
	}
	saved := hold.Saved()
	reset := g.wasReset()
	if !reset {
		g.tell("echo awake")
	}
	if pauser, ok := g.Instance.(vmm.Pauser); ok {
		ctx, cancel := context.WithTimeout(k.Context(), 100*time.Millisecond)
		if err := pauser.Resume(ctx); !errors.Is(err, context.DeadlineExceeded) {
			k.Errorf("Resume of a guest that is held by a saving: %v", err)
		}
		cancel()
	}
	select {
	case line, open := <-g.lines:
		if open || !reset {
			k.Errorf("a guest that is held by a saving says %q", line)
		}
	default:
	}
	ctx, cancel := context.WithCancel(k.Context())
	cancel() // which is no reason for it not to go on
	held, err := hold.Release(ctx)
	if err != nil || held <= 0 || saved.Held {
		k.Errorf("Saved = %+v, held for %v, %v", saved, held, err)
	}
	k.Logf("the guest was held for %v", held)
	if reset {
		g.tell("echo awake")
	}
	if got := g.line(); got != "awake" {
		k.Errorf("a guest that was saved says %q", got)
	}
	_ = g.line() // the exit status
	hold.Keep()
	if held, err := hold.Release(k.Context()); held != 0 || err != nil {
		k.Errorf("Release again = %v, %v", held, err)
	}

	g.run("word=changed")
	memory := readFile(opts.Memory)
	for _, name := range []string{"child", "twin"} {
		child := k.restore(g.cfg, saved, opts, nil)
		if got := child.run("echo $word; cat /tmp/file"); got != "remembered\nremembered" {
			k.Errorf("the %s says %q", name, got)
		}
		child.run("word=mine; echo mine >/tmp/file")
	}
	if got := g.run("echo $word; cat /tmp/file"); got != "changed\nremembered" {
		k.Errorf("the parent says %q", got)
	}
	if readFile(opts.Memory) != memory {
		k.Error("restored guests write to the file of the saved memory")
	}
}

// saveDisks: the drive of a guest that was saved stays as it was then, under another name,
// and overlays have its own: of the guest, of those restored from it, and of those restored
// from these. None sees what another writes.
func saveDisks(k *kit) {
	k.needsQCOW2()
	base := k.drive("base", "raw")
	g := k.boot(func(c *vmm.Config) { c.Drives = []vmm.Drive{k.overlay(base, "parent")} })
	g.writeLine("first")
	first, firstFiles, firstDisk := g.saveWithDisk("first")
	g.writeLine("second")
	second, secondFiles, secondDisk := g.saveWithDisk("second")
	g.writeLine("third")

	child := k.restore(g.cfg, first, firstFiles, []vmm.Drive{k.overlay(firstDisk, "child")})
	child.checkLine("first")
	child.writeLine("child")
	saved, files, disk := child.saveWithDisk("of-child")
	child.writeLine("older")
	grandchild := k.restore(child.cfg, saved, files, []vmm.Drive{k.overlay(disk, "grandchild")})
	grandchild.checkLine("child")

	other := k.restore(g.cfg, second, secondFiles, []vmm.Drive{k.overlay(secondDisk, "other")})
	other.checkLine("second")
	other.writeLine("other")
	child.checkLine("older")
	g.checkLine("third")
}

// needsQCOW2 skips a case that is about overlays, which are qcow2.
func (k *kit) needsQCOW2() {
	k.Helper()
	if !slices.Contains(k.traits().DiskFormats, "qcow2") {
		k.Skip("this backend has no overlays")
	}
}

// writeLine writes the first line of the guest's first drive.
func (g *guest) writeLine(line string) {
	g.Helper()
	g.run(fmt.Sprintf("printf '%-8s\\n' | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null", line))
}

// checkLine checks the first line of the guest's first drive, as the guest remembers it and
// as it is.
func (g *guest) checkLine(want string) {
	g.Helper()
	got := strings.Fields(g.run("head -n 1 /dev/vda; dd if=/dev/vda iflag=direct count=1 2>/dev/null | head -n 1"))
	if !slices.Equal(got, []string{want, want}) {
		g.Errorf("the guest's drive begins with %q, want %q", got, want)
	}
}

// saveWithDisk saves a guest and has its first drive written to an overlay from then on, which
// gets the name of the drive's file. It returns the drive as it stays.
func (g *guest) saveWithDisk(name string) (vmm.Saved, vmm.SaveOptions, vmm.Drive) {
	g.Helper()
	saver := g.saver(g)
	switcher, ok := g.Instance.(vmm.DiskSwitcher)
	if !ok {
		g.Skip("this backend can't switch disks")
	}
	layer := g.cfg.Drives[0]
	path := layer.Path
	layer.Path = filepath.Join(g.dir, name+".layer")
	if err := os.Link(path, layer.Path); err != nil {
		g.Fatal(err)
	}
	next := g.overlay(layer, name+"-next")
	disks, err := switcher.OpenOverlays(g.Context(), []vmm.Overlay{{Drive: 0, Path: next.Path}})
	if err != nil {
		g.Fatal(err)
	}
	opts := g.saveOptions(name)
	hold, err := saver.Save(g.Context(), opts)
	if err != nil {
		g.Fatal(err)
	}
	err = disks.Switch(g.Context())
	if err == nil {
		err = os.Rename(next.Path, path)
	}
	held, releaseErr := hold.Release(g.Context())
	if err := errors.Join(err, releaseErr, disks.Close()); err != nil {
		g.Fatal(err)
	}
	g.Logf("the guest was held for %v", held)
	g.cfg.Drives = []vmm.Drive{{Path: path, Format: next.Format, Backing: next.Backing}}
	return hold.Saved(), opts, layer
}

// overlaysFail: what can't be an overlay is an error, and overlays that are not used are
// closed; the guest and its drive stay as they are.
func overlaysFail(k *kit) {
	k.needsQCOW2()
	base := k.drive("base", "raw")
	g := k.boot(func(c *vmm.Config) {
		c.Drives = []vmm.Drive{k.overlay(base, "parent"), base, k.overlay(base, "other")}
		c.Drives[1].ReadOnly = true
	})
	switcher, ok := g.Instance.(vmm.DiskSwitcher)
	if !ok {
		k.Skip("this backend can't switch disks")
	}
	next := k.overlay(g.cfg.Drives[0], "next").Path
	closed := func(what string) {
		k.Helper()
		open, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", g.PID()))
		if err != nil || len(open) == 0 {
			k.Fatalf("%s: the VMM's files are %v, %v", what, open, err)
		}
		for _, fd := range open {
			if target, _ := os.Readlink(fd); target == next {
				k.Errorf("%s: the VMM has the overlay open", what)
			}
		}
	}
	for what, overlays := range map[string][]vmm.Overlay{
		"no file":             {{Drive: 0, Path: next}, {Drive: 2, Path: k.missing()}},
		"no overlay":          {{Drive: 0, Path: base.Path}},
		"no drive":            {{Drive: 3, Path: next}},
		"a negative drive":    {{Drive: -1, Path: next}},
		"a read-only drive":   {{Drive: 1, Path: next}},
		"a drive named twice": {{Drive: 0, Path: next}, {Drive: 0, Path: next}},
	} {
		disks, err := switcher.OpenOverlays(k.Context(), overlays)
		if err == nil {
			k.Errorf("%s: OpenOverlays succeeds", what)
			_ = disks.Close()
		}
		k.Logf("%s: %v", what, err)
		closed(what)
	}
	disks, err := switcher.OpenOverlays(k.Context(), []vmm.Overlay{{Drive: 0, Path: next}})
	if err != nil {
		k.Fatal(err)
	}
	for range 2 {
		if err := disks.Close(); err != nil {
			k.Error(err)
		}
	}
	closed("not used")
	g.writeLine("after")
	_, _, disk := g.saveWithDisk("saved") // what has failed keeps nothing from succeeding
	if got := readFile(disk.Path); !strings.Contains(got, "after ") {
		k.Error("what the guest wrote is not in the drive's file")
	}
}

// channelReset: where a saving resets the channel, its old end has ended when Save returns, and
// a new one is had once the guest goes on: of the guest that was saved, of one that was
// restored, and of one that was saved again after that. The guest remembers all the same.
func channelReset(k *kit) {
	g := k.boot(nil)
	saver := k.saver(g)
	g.run("word=remembered")
	opts := k.saveOptions("first")
	hold, err := saver.Save(k.Context(), opts)
	if err != nil {
		k.Fatal(err)
	}
	if !g.wasReset() {
		hold.Keep()
		k.Skip("a saving leaves the guest channel as it is")
	}
	select {
	case line, open := <-g.lines:
		if open {
			k.Errorf("by a channel that was reset the guest says %q", line)
		}
	case <-time.After(patience):
		k.Error("reads from a channel that was reset wait")
	}
	ctx, cancel := context.WithTimeout(k.Context(), 100*time.Millisecond)
	if channel, err := g.OpenChannel(ctx); err == nil {
		_ = channel.Close() // the guest's kernel has taken it before it was held
	} else if !errors.Is(err, context.DeadlineExceeded) {
		k.Errorf("OpenChannel to a guest that is held: %v", err)
	}
	cancel()
	if _, err := hold.Release(k.Context()); err != nil {
		k.Fatal(err)
	}
	g.reopen()
	if _, err := g.OpenChannel(k.Context()); !errors.Is(err, vmm.ErrChannelTaken) {
		k.Errorf("OpenChannel while it is open again: %v", err)
	}
	remembers := func(g *guest, who string) {
		k.Helper()
		for range 2 {
			if got := g.run("echo $word"); got != "remembered" {
				k.Errorf("%s says %q", who, got)
			}
			g.reopen()
		}
	}
	remembers(g, "the guest that was saved")
	child := k.restore(g.cfg, hold.Saved(), opts, nil)
	remembers(child, "a restored guest")
	opts = k.saveOptions("second")
	saved := child.save(opts)
	remembers(child, "a restored guest that was saved")
	child.killed()
	remembers(k.restore(g.cfg, saved, opts, nil), "a guest that was restored twice")
}

// saveHeld: a guest that is held when it is saved stays so, and what is restored from it
// runs; one that is kept held after it is, and can be told to go on.
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
		hold, err := saver.Save(k.Context(), opts)
		if err != nil {
			k.Fatal(err)
		}
		if name == "first" {
			if held, err := hold.Release(k.Context()); held != 0 || err != nil {
				k.Errorf("Release of a guest that was held before = %v, %v", held, err)
			}
		} else {
			hold.Keep()
		}
		saved := hold.Saved()
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
	g := k.boot(nil)
	saver := k.saver(g)
	mustFail := func(ctx context.Context, what string, opts vmm.SaveOptions) error {
		k.Helper()
		files := openFiles(k)
		_, err := saver.Save(ctx, opts)
		if err == nil {
			k.Fatalf("%s: Save succeeds", what)
		}
		k.Logf("%s: %v", what, err)
		if g.wasReset() {
			g.reopen()
		}
		if now := openFiles(k); now.differ(files) {
			k.Errorf("%s: open: %q; before: %q", what, now, files)
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

	ctx, cancel := context.WithCancel(k.Context())
	cancel()
	opts = k.saveOptions("given-up")
	if err := mustFail(ctx, "given up", opts); !errors.Is(err, context.Canceled) {
		k.Errorf("given up: error is %v, want the cancellation", err)
	}
	gone("given up", opts.Memory, opts.State)

	opts = k.saveOptions("saved")
	child := k.restore(g.cfg, g.save(opts), opts, nil)
	if got := child.run("echo awake"); got != "awake" {
		k.Errorf("a guest that was saved after failures says %q", got)
	}
}

// restoreFails: what can't be restored is an error that leaves nothing, not a VM.
func restoreFails(k *kit) {
	g := k.boot(nil)
	opts := k.saveOptions("saved")
	saved := g.save(opts)
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
	g.mayReset = true
	return saver
}

// save saves a guest, which goes on then.
func (g *guest) save(opts vmm.SaveOptions) vmm.Saved {
	g.Helper()
	hold, err := g.saver(g).Save(g.Context(), opts)
	if err == nil {
		_, err = hold.Release(g.Context())
	}
	if err != nil {
		g.Fatal(err)
	}
	return hold.Saved()
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
