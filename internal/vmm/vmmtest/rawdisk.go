package vmmtest

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/vmm"
)

// saveRawDisks: while a guest is held that was saved, nothing is written to its drives' files,
// however much it writes, and copies of them are what a guest goes on with that is restored.
func saveRawDisks(k *kit) {
	drives := []vmm.Drive{k.drive("line", "raw"), k.drive("count", "raw")}
	g := k.boot(func(c *vmm.Config) { c.Drives = drives })
	saver := k.saver(g)
	g.writeLine("first")
	g.run("i=0; while :; do i=$((i+1)); echo $i | dd of=/dev/vdb conv=notrunc,fsync 2>/dev/null; done >/dev/null 2>&1 &")
	var copies []vmm.Drive
	var captures []*disk.Capture
	for n, drive := range drives {
		path := filepath.Join(k.dir, fmt.Sprintf("copy%d.raw", n))
		capture, err := disk.BeginCapture(k.Context(), path, drive.Path)
		if err != nil {
			k.Fatal(err)
		}
		captures, copies = append(captures, capture), append(copies, vmm.Drive{Path: path, Format: disk.Raw})
	}
	opts := k.saveOptions("saved")
	hold, err := saver.Save(k.Context(), opts)
	if err != nil {
		k.Fatal(err)
	}
	for _, capture := range captures {
		if err := capture.Finish(k.Context()); err != nil {
			k.Error(err)
		}
	}
	for n, drive := range drives {
		if readFile(drive.Path) != readFile(copies[n].Path) {
			k.Errorf("drive %d of a guest that is held is written to", n)
		}
	}
	if _, err := hold.Release(k.Context()); err != nil {
		k.Fatal(err)
	}
	for _, capture := range captures {
		if err := capture.Close(); err != nil {
			k.Error(err)
		}
	}
	child := k.restore(g.cfg, hold.Saved(), opts, copies)
	child.checkLine("first")
	child.writeLine("child")
	if got := readFile(drives[0].Path); !strings.HasPrefix(got, "first") {
		k.Errorf("the parent's drive begins with %q", got[:8])
	}
}
