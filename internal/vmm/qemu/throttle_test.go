package qemu_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/qemu"
)

// writesTwice writes as much to two disks at once, again and again, and says when it has.
const writesTwice = `
while :; do
	dd if=/dev/zero of=/dev/vda bs=64k count=32 conv=notrunc,fsync 2>/dev/null &
	first=$!
	dd if=/dev/zero of=/dev/vdb bs=64k count=32 conv=notrunc,fsync 2>/dev/null
	wait $first
	echo "written" >/dev/console
done
`

// The drives of a VM have a limit of their sum, which stays when they get overlays, and when
// the guest is restored; it can be changed while the guest runs (L1). Only that things take
// as long as they must is asserted, as a busy host makes all of them longer.
func TestDiskLimit(t *testing.T) {
	testenv.RequireQEMU(t)
	img, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("needs qemu-img")
	}
	dir := t.TempDir()
	overlay := func(name, base, format string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		cmd := exec.CommandContext(t.Context(), img, "create", "-q", "-f", "qcow2", "-b", base, "-F", format, path)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", cmd, err, out)
		}
		return path
	}
	const (
		written = 4 << 20 // in each round, on both drives
		limit   = 4 << 20
		// least is how long a round takes: the limit allows a tenth of a second's worth more.
		least = time.Second * (written - limit/10) / limit
	)
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := vmm.Config{
		ID: "slow", Accelerator: vmm.TCG, VCPUs: 1, MemoryMiB: 128,
		Kernel: testenv.Kernel(t), Initrd: testenv.Initramfs(t, writesTwice), BootArgs: "console=ttyS0 panic=1 quiet",
		ConsolePath: filepath.Join(dir, "console"), LogPath: filepath.Join(dir, "log"),
	}
	for n := range 2 {
		cfg.Drives = append(cfg.Drives, vmm.Drive{
			Path: overlay(fmt.Sprintf("drive%d", n), base, "raw"), Format: "qcow2", Backing: []vmm.DiskFile{{Path: base, Format: "raw"}},
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	start := func() vmm.Instance {
		t.Helper()
		instance, err := qemu.New(qemu.Options{}).Start(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = instance.Kill(context.Background()) })
		return instance
	}
	// rounds returns how long that many rounds take, from the end of one that is under way.
	rounds := func(instance vmm.Instance, n int) time.Duration {
		t.Helper()
		count := func() int { return strings.Count(instance.(vmm.Consoler).ConsoleTail(1<<20), "written") } //nolint:forcetypeassert // it is one
		await := func(most int) {
			for count() < most {
				if ctx.Err() != nil {
					t.Fatalf("the guest has not written %d times; it says: %s", most, instance.(vmm.Consoler).ConsoleTail(1<<10)) //nolint:forcetypeassert // as above
				}
				time.Sleep(time.Millisecond)
			}
		}
		first := count() + 1
		await(first)
		began := time.Now()
		await(first + n)
		return time.Since(began)
	}
	limited := func(what string, instance vmm.Instance) {
		t.Helper()
		if took := rounds(instance, 2); took < 2*least-200*time.Millisecond {
			t.Errorf("%s: writing twice %d MiB took %s, want at least %s", what, written>>20, took, 2*least)
		}
		if got := instance.(vmm.Limiter).Limits(); got.DiskBytesPerSecond != limit || got.DiskIOPS != 0 { //nolint:forcetypeassert // it is one
			t.Errorf("%s: limits are %+v", what, got)
		}
	}

	instance := start()
	free := rounds(instance, 2)
	t.Logf("without a limit writing twice %d MiB takes %s", written>>20, free)
	limiter := instance.(vmm.DiskLimiter) //nolint:forcetypeassert // it is one
	if err := limiter.SetDiskLimit(ctx, vmm.DiskLimit{BytesPerSecond: limit}); err != nil {
		t.Fatal(err)
	}
	limited("set while the guest runs", instance)
	opts := vmm.SaveOptions{Memory: filepath.Join(dir, "memory"), State: filepath.Join(dir, "state")}
	var overlays []vmm.Overlay
	for n, drive := range cfg.Drives {
		overlays = append(overlays, vmm.Overlay{Drive: n, Path: overlay(fmt.Sprintf("next%d", n), drive.Path, "qcow2")})
	}
	disks, err := instance.(vmm.DiskSwitcher).OpenOverlays(ctx, overlays) //nolint:forcetypeassert // it is one
	if err != nil {
		t.Fatal(err)
	}
	hold, err := instance.(vmm.Saver).Save(ctx, opts) //nolint:forcetypeassert // it is one
	if err == nil {
		err = disks.Switch(ctx)
	}
	if err == nil {
		_, err = hold.Release(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	limited("after the drives got overlays", instance)
	if err := limiter.SetDiskLimit(ctx, vmm.DiskLimit{}); err != nil {
		t.Fatal(err)
	}
	_ = rounds(instance, 1)
	if err := limiter.SetDiskLimit(ctx, vmm.DiskLimit{IOPS: 10}); err != nil {
		t.Fatal(err)
	}
	// The guest's kernel makes no write larger than 1 MiB of these, so of each round at least
	// 4, and 2 flushes that are not counted.
	if took, want := rounds(instance, 5), time.Second; took < want {
		t.Errorf("with 10 IOPS 5 rounds took %s, want at least %s", took, want)
	}
	if err := instance.Kill(ctx); err != nil {
		t.Fatal(err)
	}

	cfg.DiskLimit = vmm.DiskLimit{BytesPerSecond: limit}
	cfg.Restore = &vmm.Restore{Memory: opts.Memory, State: opts.State}
	cfg.ConsolePath += "-restored"
	for n, drive := range cfg.Drives {
		cfg.Drives[n].Path = overlay(fmt.Sprintf("child%d", n), drive.Path, "qcow2")
		cfg.Drives[n].Backing = append([]vmm.DiskFile{{Path: drive.Path, Format: "qcow2"}}, drive.Backing...)
	}
	limited("restored with a limit", start())
}
