package vmmtest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/smolvm/smolvm/internal/vmm"
)

// busyWriters are how many programs write files in a guest that is saved.
const busyWriters = 2

// busy is what each of them does: files are made, renamed, replaced and appended to, so
// that the kernel's own threads write to memory too, on every CPU.
const busy = `sh -c 'mkdir -p /data/$0; cd /data/$0; i=0; ` +
	`while :; do i=$((i+1)); echo $i >t; mv t f$((i%%50)); echo $i >>log; done' %d >/dev/null 2>&1 &`

// saveBusy: the memory that was saved is the guest's at the moment from which it was
// held, however much it was doing, on one CPU or on several. The memory is compared with
// the VMM's own, which lies in its process.
//
// The guest is one that was restored: that is what most VMs are, and what they write is
// to copies of pages.
func saveBusy(vcpus int) func(*kit) {
	return func(k *kit) {
		rounds := k.assets.BusySaves
		if rounds == 0 {
			k.Skip("busy guests are left out")
		}
		disk := k.ext4("data")
		origin := k.boot(func(c *vmm.Config) {
			c.VCPUs, c.MemoryMiB, c.Drives = vcpus, 512, []vmm.Drive{disk}
		})
		_ = k.saver(origin)
		origin.run("mkdir /data; mount -t ext4 /dev/vda /data")
		opts := k.saveOptions("origin")
		saved := origin.saveAndKeep(opts) // the drive stays as it is
		origin.killed()
		g := k.restore(origin.cfg, saved, opts, origin.cfg.Drives)
		pauser, ok := g.Instance.(vmm.Pauser)
		if !ok {
			k.Skip("this backend can't pause VMs")
		}
		for n := range busyWriters {
			g.run(fmt.Sprintf(busy, n))
		}
		check := k.assets.CheckSave
		if check == nil {
			check = notHeldEarly
		}
		bad := 0
		for round := range rounds {
			g.run("sleep 0.3")
			opts := k.saveOptions(fmt.Sprint("round-", round))
			saved := g.saveAndKeep(opts)
			k.Logf("save %d: %d pages reread, %d stale", round, saved.Reread, saved.Stale)
			if err := check(saved); err != nil {
				k.Errorf("save %d: %v", round, err)
			}
			stale, err := differing(g.PID(), opts.Memory)
			if err != nil {
				k.Fatal(err)
			}
			if len(stale) > 0 {
				bad++
				k.Errorf("save %d: %d pages of the saved memory are not the guest's: %x", round, len(stale), stale)
			}
			if err := pauser.Resume(k.Context()); err != nil {
				k.Fatal(err)
			}
			if err := errors.Join(os.Remove(opts.Memory), os.Remove(opts.State)); err != nil {
				k.Fatal(err)
			}
		}
		k.Logf("of %d saves of a guest with %d CPUs %d were bad", rounds, vcpus, bad)
	}
}

// saveAndKeep saves a guest, which is paused then.
func (g *guest) saveAndKeep(opts vmm.SaveOptions) vmm.Saved {
	g.Helper()
	hold, err := g.saver(g).Save(g.Context(), opts)
	if err != nil {
		g.Fatal(err)
	}
	hold.Keep()
	return hold.Saved()
}

func notHeldEarly(saved vmm.Saved) error {
	if saved.Early {
		return errors.New("the guest was held early")
	}
	return nil
}

// ext4 makes a drive with an empty ext4 file system.
func (k *kit) ext4(name string) vmm.Drive {
	k.Helper()
	program, err := exec.LookPath("mke2fs")
	if err != nil {
		program = "/usr/sbin/mke2fs"
	}
	path := filepath.Join(k.dir, name+".ext4")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		k.Fatal(err)
	}
	if err := os.Truncate(path, 256<<20); err != nil {
		k.Fatal(err)
	}
	cmd := exec.CommandContext(k.Context(), program, "-q", "-t", "ext4", path)
	if output, err := cmd.CombinedOutput(); err != nil {
		k.Skipf("needs mke2fs: %v: %s", err, output)
	}
	return vmm.Drive{Path: path, Format: "raw"}
}

// differing compares the memory that a held guest has in its VMM's process with a file
// of the same size, and returns the offsets of the pages that differ.
func differing(pid int, path string) ([]int64, error) {
	saved, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = saved.Close() }()
	info, err := saved.Stat()
	if err != nil {
		return nil, err
	}
	start, err := mappingOf(pid, info.Size())
	if err != nil {
		return nil, err
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, err
	}
	defer func() { _ = memory.Close() }()
	const pageSize = 4096
	var offsets []int64
	ours, theirs := make([]byte, 1<<20), make([]byte, 1<<20)
	for at := int64(0); at < info.Size(); at += int64(len(ours)) {
		if _, err := saved.ReadAt(ours, at); err != nil {
			return nil, err
		}
		if _, err := memory.ReadAt(theirs, start+at); err != nil {
			return nil, err
		}
		for page := 0; page < len(ours); page += pageSize {
			if !bytes.Equal(ours[page:page+pageSize], theirs[page:page+pageSize]) {
				offsets = append(offsets, at+int64(page))
			}
		}
	}
	return offsets, nil
}

// mappingOf finds the only mapping of a process that has a size and may be written to.
func mappingOf(pid int, size int64) (start int64, err error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, err
	}
	defer func() { _ = maps.Close() }()
	found := 0
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); err != nil {
			return 0, err
		}
		if to-from == uint64(size) && strings.HasPrefix(mode, "rw-") {
			start = int64(from)
			found++
		}
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	if found != 1 {
		return 0, fmt.Errorf("process %d has %d mappings of %d bytes", pid, found, size)
	}
	return start, nil
}
