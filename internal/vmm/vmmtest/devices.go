package vmmtest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// machine: the guest has what was asked for.
func machine(k *kit) {
	g := k.boot(func(c *vmm.Config) {
		c.VCPUs, c.MemoryMiB = 2, 256
		c.BootArgs += " vmmtest.word=1"
	})
	if got := g.run("nproc"); got != "2" {
		k.Errorf("the guest has %s CPUs, want 2", got)
	}
	kibibytes, err := strconv.Atoi(g.run("awk '/^MemTotal/ { print $2 }' /proc/meminfo"))
	// A kernel keeps some for itself.
	if mebibytes := kibibytes >> 10; err != nil || mebibytes > 256 || mebibytes < 180 {
		k.Errorf("the guest has %d MiB of memory (%v), want somewhat less than 256", mebibytes, err)
	}
	if got := strings.Fields(g.run("cat /proc/cmdline")); !slices.Contains(got, "vmmtest.word=1") {
		k.Errorf("the kernel's arguments are %q, without our own", got)
	}
	if got := k.traits().Name; got != g.backend.Name() {
		k.Errorf("backend %q has the traits of %q", g.backend.Name(), got)
	}
	if _, err := os.Stat("/proc/" + strconv.Itoa(g.PID())); err != nil {
		k.Errorf("the VMM's process: %v", err)
	}
}

// traits are those of the backend.
func (k *kit) traits() vmm.Traits {
	k.Helper()
	if k.assets.Traits.Name != "" {
		return k.assets.Traits
	}
	declared, err := traits.Lookup(k.backend.Name())
	if err != nil {
		k.Fatal(err)
	}
	return declared
}

// console: what the kernel and init print is appended to the file.
func console(k *kit) {
	const earlier, mark = "of an earlier run\n", "a word on the console"
	g := k.boot(func(c *vmm.Config) {
		if err := os.WriteFile(c.ConsolePath, []byte(earlier), 0o600); err != nil {
			k.Fatal(err)
		}
	})
	g.run("echo " + mark + " >/dev/console")
	// The command has ended when the guest's driver has the text, not the host.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(patience)
	for !strings.Contains(readFile(g.cfg.ConsolePath), mark) {
		select {
		case <-tick.C:
		case <-limit:
			k.Fatalf("the console's file lacks %q", mark)
		}
	}
	if got := readFile(g.cfg.ConsolePath); !strings.HasPrefix(got, earlier) {
		k.Errorf("the console's file does not begin with what it held: %.100q", got)
	}
}

// consoleFloods: a guest that prints without end takes no more of the disk than the log's
// limit, does not hold up its VMM, and its last words are not lost.
func consoleFloods(k *kit) {
	g := k.boot(nil)
	g.run("while :; do cat /proc/kallsyms; done >/dev/console &")
	deadline := time.Now().Add(patience)
	for turns := 0; turns < 3; { // once for the boot's text, and twice for the flood's
		if time.Now().After(deadline) {
			k.Fatalf("the console's log was not turned over; it has %d bytes", len(readFile(g.cfg.ConsolePath)))
		}
		before := len(readFile(g.cfg.ConsolePath))
		g.run("true") // while it floods
		if len(readFile(g.cfg.ConsolePath)) < before {
			turns++
		}
	}
	if got := len(readFile(g.cfg.ConsolePath)) + len(readFile(ring.Previous(g.cfg.ConsolePath))); int64(got) > 2*k.assets.ConsoleBytes+4096 {
		k.Errorf("the console's log has %d bytes", got)
	}
	g.tell("exit 1")
	g.ended(vmm.ExitPanic, "Attempted to kill init!", time.Time{})
	keeper, ok := g.Instance.(vmm.Consoler)
	if !ok || !strings.Contains(keeper.ConsoleTail(4096), "\n") {
		k.Error("the instance does not know the end of the console")
	}
}

// clock: the guest's clock shows the host's time, and runs at its speed.
func clock(k *kit) {
	if k.assets.SkipClock != "" {
		k.Skip(k.assets.SkipClock)
	}
	// A kernel counts time by ticks until it has chosen a clock, and loses those that come while it
	// prints: many of them where a character takes a millisecond.
	g := k.boot(func(c *vmm.Config) { c.BootArgs += " quiet" })
	// The guest reads its clock at some time between early and late.
	read := func() (early time.Time, uptime, date float64, late time.Time) {
		early = time.Now()
		words := strings.Fields(g.run("cut -d' ' -f1 /proc/uptime; date +%s"))
		late = time.Now()
		if len(words) != 2 {
			k.Fatalf("the guest's clock is %q", words)
		}
		return early, number(k, words[0]), number(k, words[1]), late
	}
	early1, uptime1, date, late1 := read()
	const slack = 3 // seconds: the date is in whole ones
	if date < float64(early1.Unix()-slack) || date > float64(late1.Unix()+slack) {
		k.Errorf("the guest's date is %.0f s from the host's", date-float64(late1.Unix()))
	}
	<-time.After(2 * time.Second)
	early2, uptime2, _, late2 := read()
	least, most := early2.Sub(late1).Seconds(), late2.Sub(early1).Seconds()
	const tolerance = 1.1
	if passed := uptime2 - uptime1; passed < least/tolerance || passed > most*tolerance {
		k.Errorf("%.2f s passed in the guest, between %.2f and %.2f s on the host", passed, least, most)
	}
}

func number(k *kit, text string) float64 {
	k.Helper()
	value, err := strconv.ParseFloat(text, 64)
	if err != nil {
		k.Fatal(err)
	}
	return value
}

// channel: bytes get through unchanged, in both directions, also those written
// before the guest listens.
func channel(k *kit) {
	g := k.start(nil)
	g.tell("echo written early")
	for _, want := range []string{ready, "written early", status + "0"} {
		if got := g.line(); got != want {
			k.Fatalf("the guest says %q, want %q", got, want)
		}
	}
	// More than any buffer on the way holds, and every value that a byte can have.
	const size = 1 << 20
	data := make([]byte, size)
	_, _ = rand.Read(data) // never fails
	g.tell("head -c " + strconv.Itoa(size) + " <&3 | sha256sum")
	if _, err := g.channel.Write(data); err != nil {
		k.Fatal(err)
	}
	sum := sha256.Sum256(data)
	if got, want := g.line(), hex.EncodeToString(sum[:]); !strings.HasPrefix(got, want) {
		k.Errorf("the guest received data of hash %s, want %s", got, want)
	}
	_ = g.line() // the exit status
	if got := g.run("head -c " + strconv.Itoa(size) + " /dev/zero | tr '\\0' x; echo"); got != strings.Repeat("x", size) {
		k.Errorf("the host received %d bytes, of %d that the guest sent", len(got), size)
	}
	g.killed()
	if _, err := g.channel.Write([]byte("anybody there?")); err == nil {
		k.Error("the channel of a VM that has ended takes data")
	}
}

// noChannel: a guest that was given none has none.
func noChannel(k *kit) {
	g := k.start(func(c *vmm.Config) { c.Channel = false })
	if got, err := g.OpenChannel(k.Context()); got != nil || !errors.Is(err, smolvm.ErrUnsupported) {
		k.Errorf("OpenChannel = %v, %v", got, err)
	}
}

// channelAgain: a call that was given up has opened nothing; while the channel is open it is
// not opened again, and when it was closed it is a new one, if that can be had.
func channelAgain(k *kit) {
	g := k.launch(nil)
	taken := func(when string, err error) {
		k.Helper()
		if !errors.Is(err, vmm.ErrChannelTaken) {
			k.Errorf("OpenChannel %s: %v", when, err)
		}
	}
	ctx, cancel := context.WithCancel(k.Context())
	cancel()
	if channel, err := g.OpenChannel(ctx); channel != nil || !errors.Is(err, context.Canceled) {
		k.Errorf("OpenChannel that was given up = %v, %v", channel, err)
	}
	g.open()
	if got := g.line(); got != ready {
		k.Fatalf("the guest says %q, want %q", got, ready)
	}
	_, err := g.OpenChannel(k.Context())
	taken("while it is open", err)
	if got := g.run("echo as before"); got != "as before" {
		k.Errorf("the guest says %q", got)
	}
	_ = g.channel.Close()
	for range g.lines { // its reader ends
	}
	again, err := g.OpenChannel(k.Context())
	if err != nil {
		taken("after it was closed", err)
	} else {
		g.channel, g.lines = again, readLines(again)
		if got := g.line(); got != ready {
			k.Fatalf("by a new channel the guest says %q, want %q", got, ready)
		}
		if got := g.run("echo anew"); got != "anew" {
			k.Errorf("by a new channel the guest says %q", got)
		}
		_ = again.Close()
	}
	g.killed()
	if channel, err := g.OpenChannel(k.Context()); err == nil {
		k.Errorf("the channel of a VM that has ended is opened: %v", channel)
	}
}

// drives: they come in order, can be written unless they are read-only, and what
// was written is in the file when the VM has ended.
func drives(k *kit) {
	list := []vmm.Drive{
		k.drive("first", "raw"),
		k.drive("second", "raw"),
		k.drive("third", "raw"),
	}
	list[1].ReadOnly = true
	for _, format := range k.traits().DiskFormats {
		if _, err := exec.LookPath("qemu-img"); err != nil {
			k.Log("drives of other formats than raw are not tested: ", err)
			break
		}
		if format != "raw" {
			list = append(list, k.drive("in-"+format, format))
		}
	}
	g := k.boot(func(c *vmm.Config) { c.Drives = list })
	for i, drive := range list {
		device := "vd" + string(rune('a'+i))
		name := strings.TrimSuffix(filepath.Base(drive.Path), ".img")
		if got := g.run("head -n 1 /dev/" + device); got != name {
			k.Errorf("%s holds %q, want %q", device, got, name)
		}
		want := map[bool]string{false: "0", true: "1"}[drive.ReadOnly]
		if got := g.run("cat /sys/block/" + device + "/ro"); got != want {
			k.Errorf("%s has ro=%s, want %s", device, got, want)
		}
	}
	g.run("printf 'written\\n' | dd of=/dev/vdc conv=notrunc,fsync 2>/dev/null")
	if _, code := g.try("printf 'written\\n' | dd of=/dev/vdb conv=notrunc,fsync 2>/dev/null"); code == "0" {
		k.Error("the guest can write to a read-only drive")
	}
	k.checkUsage(g)
	g.killed()
	for i, want := range []string{"first\n", "second\n", "written\n"} {
		if got := readFile(list[i].Path); !strings.HasPrefix(got, want) {
			k.Errorf("the file of drive %d begins with %.10q, want %q", i, got, want)
		}
	}
}

// checkUsage checks that what a guest has read and written on its drives is counted, if its VMM
// counts it.
func (k *kit) checkUsage(g *guest) {
	k.Helper()
	meter, ok := g.Instance.(vmm.Meter)
	if !ok {
		return
	}
	used := func() smolvm.DiskUsage {
		usage, err := meter.DiskUsage(k.Context())
		if err != nil {
			k.Fatal("usage of the drives: ", err)
		}
		return usage
	}
	before := used()
	const block = 64 << 10
	g.run("dd if=/dev/zero of=/dev/vdc bs=64k count=1 seek=2 conv=notrunc,fsync 2>/dev/null; dd if=/dev/vda bs=64k count=1 skip=12 of=/dev/null 2>/dev/null")
	after := used()
	if after.Written < before.Written+block || after.Read < before.Read+block || after.Writes <= before.Writes || after.Reads <= before.Reads {
		k.Errorf("after 64 KiB were written, and as many read, the VMM's count has gone from %+v to %+v", before, after)
	}
}

// drive makes a drive of 1 MiB whose first line is its name.
func (k *kit) drive(name, format string) vmm.Drive {
	k.Helper()
	path := filepath.Join(k.dir, name+".img")
	if err := os.WriteFile(path, []byte(name+"\n"), 0o600); err != nil {
		k.Fatal(err)
	}
	if err := os.Truncate(path, 1<<20); err != nil {
		k.Fatal(err)
	}
	if format == "raw" {
		return vmm.Drive{Path: path, Format: format}
	}
	raw := path + ".raw"
	if err := os.Rename(path, raw); err != nil {
		k.Fatal(err)
	}
	// It takes both file names as they are.
	cmd := exec.CommandContext(k.Context(), "qemu-img", "convert", "-f", "raw", "-O", format, raw, path)
	if output, err := cmd.CombinedOutput(); err != nil {
		k.Fatalf("%v: %v: %s", cmd, err, output)
	}
	return vmm.Drive{Path: path, Format: format}
}

// blockDevice: a drive can be a block device of the host's.
func blockDevice(k *kit) {
	if k.assets.SkipDevice != "" {
		k.Skip(k.assets.SkipDevice)
	}
	if os.Getuid() != 0 {
		k.Skip("making a block device takes root")
	}
	file := k.drive("device", "raw").Path
	device, err := exec.CommandContext(k.Context(), "losetup", "--find", "--show", file).Output()
	if err != nil {
		k.Skip("this host has no loop devices: ", err)
	}
	path := strings.TrimSpace(string(device))
	k.Cleanup(func() {
		if out, err := exec.CommandContext(context.WithoutCancel(k.Context()), "losetup", "--detach", path).CombinedOutput(); err != nil {
			k.Errorf("detach %s: %v: %s", path, err, out)
		}
	})
	g := k.boot(func(c *vmm.Config) { c.Drives = []vmm.Drive{{Path: path, Format: "raw", Device: true}} })
	if got := g.run("head -n 1 /dev/vda"); got != "device" {
		k.Errorf("the drive holds %q", got)
	}
	g.writeLine("written")
	g.killed()
	if got := readFile(path); !strings.HasPrefix(got, "written") {
		k.Errorf("the block device begins with %.10q", got)
	}
}

// sharedDrive: VMs can share what they only read.
func sharedDrive(k *kit) {
	drive := k.drive("shared", "raw")
	drive.ReadOnly = true
	share := func(c *vmm.Config) { c.Drives = []vmm.Drive{drive} }
	for _, g := range []*guest{k.start(share), k.start(share)} {
		if got := g.line(); got != ready {
			k.Fatalf("the guest says %q, want %q", got, ready)
		}
		if got := g.run("head -n 1 /dev/vda"); got != "shared" {
			k.Errorf("the shared drive holds %q", got)
		}
	}
}
