package firecracker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/namespace/namespacetest"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/firecrackerfake"
)

// What Firecracker is told of a VM are names in its own directory, and what the VM needs.
func TestBootRequests(t *testing.T) {
	t.Parallel()
	r := newRoom(t)
	r.start(r.config(firecrackerfake.Behaviour{}, func(c *vmm.Config) {
		c.DiskLimit = vmm.DiskLimit{BytesPerSecond: 1 << 20, IOPS: 10}
	}))
	want := []string{
		"GET /version ",
		`PUT /machine-config {"vcpu_count":2,"mem_size_mib":16}`,
		`PUT /boot-source {"kernel_image_path":"kernel","initrd_path":"initrd","boot_args":"quiet console=ttyS0 reboot=k panic=1 pci=off ` +
			`i8042.noaux i8042.nomux i8042.dumbkbd smolvm.vsock=1024"}`,
		`PUT /drives/drive0 {"drive_id":"drive0","path_on_host":"drive0","is_root_device":false,"is_read_only":false,"cache_type":"Writeback",` +
			`"rate_limiter":{"bandwidth":{"size":52428,"refill_time":100},"ops":{"size":5,"refill_time":1000}}}`,
		`PUT /drives/drive1 {"drive_id":"drive1","path_on_host":"drive1","is_root_device":false,"is_read_only":true,"cache_type":"Writeback",` +
			`"rate_limiter":{"bandwidth":{"size":52428,"refill_time":100},"ops":{"size":5,"refill_time":1000}}}`,
		`PUT /vsock {"guest_cid":3,"uds_path":"vsock.sock"}`,
		`PUT /entropy {}`,
		`PUT /actions {"action_type":"InstanceStart"}`,
	}
	got := r.requests("")
	for i := range want {
		want[i] = strings.TrimSpace(want[i])
	}
	if !slices.Equal(got, want) {
		t.Errorf("Firecracker was told\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for name, target := range map[string]string{"kernel": "vmlinux", "initrd": "initramfs", "drive0": "a,b =c", "drive1": "other"} {
		if path, err := os.Readlink(filepath.Join(r.dir, "vmm", name)); err != nil || path != filepath.Join(r.dir, target) {
			t.Errorf("%s leads to %q, %v", name, path, err)
		}
	}
}

// A network interface that is a link is the TAP of a network namespace for Firecracker, which
// offers its MTU if the release can.
func TestNetworkRequests(t *testing.T) {
	t.Parallel()
	if err := namespace.Check(t.Context(), namespacetest.Program()); err != nil {
		t.Skip("namespaces can't be had here: ", err)
	}
	for version, mtu := range map[string]string{"1.15.1": "", "1.16.0": `,"mtu":1400`} {
		r := newRoom(t)
		ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		link, other := os.NewFile(uintptr(ends[0]), "link"), os.NewFile(uintptr(ends[1]), "link")
		instance := r.start(r.config(firecrackerfake.Behaviour{Version: version}, func(c *vmm.Config) {
			c.NIC = &vmm.NIC{MAC: "02:00:00:00:00:02", MTU: 1400, Link: link}
		}))
		want := []string{`{"iface_id":"net","host_dev_name":"tap0","guest_mac":"02:00:00:00:00:02"` + mtu + `}`}
		if got := r.requests("PUT /network-interfaces/net "); !slices.Equal(got, want) {
			t.Errorf("%s was told %q, want %q", version, got, want)
		}
		if err := errors.Join(instance.Kill(t.Context()), link.Close(), other.Close()); err != nil {
			t.Error(err)
		}
	}
}

// The limit of the drives can be changed and taken away, and says what is in force.
func TestDiskLimit(t *testing.T) {
	t.Parallel()
	r := newRoom(t)
	instance := r.start(r.config(firecrackerfake.Behaviour{}, func(c *vmm.Config) { c.Drives = c.Drives[:1] }))
	for _, test := range []struct {
		limit vmm.DiskLimit
		want  string
	}{
		{vmm.DiskLimit{BytesPerSecond: 1000}, `{"bandwidth":{"size":100,"refill_time":100},"ops":{"size":0,"refill_time":0}}`},
		{vmm.DiskLimit{IOPS: 3}, `{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":3,"refill_time":1000}}`},
		{vmm.DiskLimit{}, `{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":0,"refill_time":0}}`},
	} {
		if err := instance.(vmm.DiskLimiter).SetDiskLimit(t.Context(), test.limit); err != nil { //nolint:forcetypeassert // it is one
			t.Fatal(err)
		}
		told := r.requests("PATCH /drives/drive0 ")
		if got, want := told[len(told)-1], `{"drive_id":"drive0","rate_limiter":`+test.want+`}`; got != want {
			t.Errorf("%+v: Firecracker was told %s, want %s", test.limit, got, want)
		}
		limits := instance.(vmm.Limiter).Limits() //nolint:forcetypeassert // it is one
		if limits.DiskBytesPerSecond != test.limit.BytesPerSecond || limits.DiskIOPS != test.limit.IOPS {
			t.Errorf("%+v: limits are %+v", test.limit, limits)
		}
	}
}

// Firecracker's metrics count from the last time, and are added up.
func TestDiskUsage(t *testing.T) {
	t.Parallel()
	r := newRoom(t)
	meter := r.start(r.config(firecrackerfake.Behaviour{}, nil)).(vmm.Meter) //nolint:forcetypeassert // it is one
	for n := int64(1); n <= 2; n++ {
		want := smolvm.DiskUsage{Read: 4096 * n, Written: 512 * n, Reads: 2 * n, Writes: n}
		if got, err := meter.DiskUsage(t.Context()); got != want || err != nil {
			t.Errorf("usage is %+v, %v, want %+v", got, err, want)
		}
	}
}

// Metrics that never come are not waited for beyond the call's time.
func TestDiskUsageNeverComes(t *testing.T) {
	t.Parallel()
	r := newRoom(t)
	instance := r.start(r.config(firecrackerfake.Behaviour{Mute: true}, nil))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if got, err := instance.(vmm.Meter).DiskUsage(ctx); !errors.Is(err, context.DeadlineExceeded) { //nolint:forcetypeassert // it is one
		t.Errorf("usage is %+v, %v", got, err)
	}
}

// A channel is opened when the guest listens, once at a time, and again.
func TestChannel(t *testing.T) {
	t.Parallel()
	r := newRoom(t)
	instance := r.start(r.config(firecrackerfake.Behaviour{Deaf: 5}, nil))
	channel, lines := r.open(instance)
	if _, err := instance.OpenChannel(t.Context()); !errors.Is(err, vmm.ErrChannelTaken) {
		t.Errorf("OpenChannel while it is open: %v", err)
	}
	if _, err := fmt.Fprintln(channel, "hello"); err != nil || !lines.Scan() || lines.Text() != "hello" {
		t.Errorf("the guest says %q, %v", lines.Text(), err)
	}
	// A deadline that has passed ends nothing.
	if err := channel.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := channel.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read: %v", err)
	}
	if _, err := instance.OpenChannel(t.Context()); !errors.Is(err, vmm.ErrChannelTaken) {
		t.Errorf("OpenChannel while it is open still: %v", err)
	}
	if err := channel.Close(); err != nil {
		t.Error(err)
	}
	r.open(instance)
	if err := instance.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := instance.OpenChannel(t.Context()); err == nil || errors.Is(err, vmm.ErrChannelTaken) {
		t.Errorf("OpenChannel of a VM that has ended: %v", err)
	}
}

// Where a guest that was just restored may break a connection, one is given up for that.
func TestChannelAfterRestore(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]int{"1.15.1": 2, "1.16.0": 1} {
		r := newRoom(t)
		behaviour := firecrackerfake.Behaviour{Version: version}
		opts := r.saveOptions()
		hold, err := r.start(r.config(behaviour, nil)).(vmm.Saver).Save(t.Context(), opts) //nolint:forcetypeassert // it is one
		if err != nil {
			t.Fatal(err)
		}
		hold.Keep()
		child := newRoom(t)
		instance := child.start(child.config(behaviour, func(c *vmm.Config) {
			c.Restore = &vmm.Restore{Memory: opts.Memory, State: opts.State}
		}))
		for n := range 2 {
			channel, lines := child.open(instance)
			if _, err := fmt.Fprintln(channel, "awake"); err != nil || !lines.Scan() || lines.Text() != "awake" {
				t.Errorf("%s: the guest says %q, %v", version, lines.Text(), err)
			}
			if got := len(child.requests("vsock connection")); got != want+n {
				t.Errorf("%s: channel %d took %d connections, want %d", version, n, got, want+n)
			}
			if err := channel.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// A guest that never listens is waited for until the call is given up.
func TestChannelOfDeafGuest(t *testing.T) {
	t.Parallel()
	r := newRoom(t)
	instance := r.start(r.config(firecrackerfake.Behaviour{Deaf: 1 << 30}, nil))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := instance.OpenChannel(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("OpenChannel: %v", err)
	}
	other := newRoom(t)
	instance = other.start(other.config(firecrackerfake.Behaviour{}, func(c *vmm.Config) { c.Channel = false }))
	if _, err := instance.OpenChannel(t.Context()); !errors.Is(err, smolvm.ErrUnsupported) {
		t.Errorf("OpenChannel of a VM without: %v", err)
	}
}

// Releases that lose the channel of a guest that is paused don't pause one.
func TestPauseOfFaultyRelease(t *testing.T) {
	t.Parallel()
	for version, faulty := range map[string]bool{"1.15.0": false, "1.16.1": true, "1.17.0-dev": false} {
		r := newRoom(t)
		pauser := r.start(r.config(firecrackerfake.Behaviour{Version: version}, nil)).(vmm.Pauser) //nolint:forcetypeassert // it is one
		for range 2 {                                                                              // the second time it does nothing
			if err := pauser.Pause(t.Context()); errors.Is(err, smolvm.ErrUnsupported) != faulty || err != nil && !faulty {
				t.Errorf("%s: Pause: %v", version, err)
			}
		}
		if err := pauser.Resume(t.Context()); err != nil {
			t.Errorf("%s: Resume: %v", version, err)
		}
		want := []string{`{"state":"Paused"}`, `{"state":"Resumed"}`}
		if faulty {
			want = nil
		}
		if got := r.requests("PATCH /vm "); !slices.Equal(got, want) {
			t.Errorf("%s: Firecracker was told %q, want %q", version, got, want)
		}
	}
}

func (r *room) saveOptions() vmm.SaveOptions {
	return vmm.SaveOptions{Memory: filepath.Join(r.dir, "saved.memory"), State: filepath.Join(r.dir, "saved.state")}
}

// A saved guest's memory has holes where it holds nothing; the guest is held until it is
// released, its channel is a new one then, and it can be restored, with other limits and other
// files.
func TestSaveAndRestore(t *testing.T) {
	t.Parallel()
	r := newRoom(t)
	config := r.config(firecrackerfake.Behaviour{}, nil)
	instance := r.start(config)
	old, lines := r.open(instance)
	opts := r.saveOptions()
	hold, err := instance.(vmm.Saver).Save(t.Context(), opts) //nolint:forcetypeassert // it is one
	if err != nil {
		t.Fatal(err)
	}
	if lines.Scan() || lines.Err() == nil {
		t.Errorf("the channel of a guest that was saved: %q, %v", lines.Text(), lines.Err())
	}
	if _, err := old.Write([]byte("x")); err == nil {
		t.Error("the channel of a guest that was saved takes data")
	}
	r.isSparse(opts.Memory, int64(config.MemoryMiB)<<20)
	if held, err := hold.Release(t.Context()); held <= 0 || err != nil {
		t.Errorf("Release = %v, %v", held, err)
	}
	again, lines := r.open(instance)
	if _, err := fmt.Fprintln(again, "awake"); err != nil || !lines.Scan() || lines.Text() != "awake" {
		t.Errorf("a guest that was saved says %q, %v", lines.Text(), err)
	}

	child := newRoom(t)
	restored := child.start(child.config(firecrackerfake.Behaviour{}, func(c *vmm.Config) {
		c.Kernel, c.DiskLimit = "", vmm.DiskLimit{IOPS: 100}
		c.Restore = &vmm.Restore{Memory: opts.Memory, State: opts.State}
	}))
	want := []string{
		"GET /version",
		`PUT /snapshot/load {"snapshot_path":"state","mem_backend":{"backend_type":"File","backend_path":"memory"}}`,
		`PATCH /drives/drive0 {"drive_id":"drive0","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":5,"refill_time":100}}}`,
		`PATCH /drives/drive1 {"drive_id":"drive1","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":5,"refill_time":100}}}`,
		`PATCH /vm {"state":"Resumed"}`,
	}
	if got := child.requests(""); !slices.Equal(got, want) {
		t.Errorf("Firecracker was told\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	child.open(restored)
}

// isSparse checks a saved memory of the fake's: of two pages, of which the rest is a hole.
func (r *room) isSparse(path string, size int64) {
	r.Helper()
	file, err := os.Open(path)
	if err != nil {
		r.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil || info.Size() != size {
		r.Fatalf("%s: %v, %v, want %d bytes", path, info, err, size)
	}
	const pageSize = 4096
	one := make([]byte, 1)
	for _, at := range []int64{pageSize, size - 1} {
		if _, err := file.ReadAt(one, at); err != nil || one[0] != 1 {
			r.Errorf("the saved memory has %d at %d, %v", one[0], at, err)
		}
	}
	if hole, err := file.Seek(0, unix.SEEK_HOLE); err != nil || hole != 0 {
		if hole == size {
			r.Skip("this file system has no holes")
		}
		r.Errorf("the first hole is at %d, %v", hole, err)
	}
	if data, err := file.Seek(2*pageSize, unix.SEEK_DATA); err != nil || data != size-pageSize {
		r.Errorf("there is data at %d, %v, want the last page, at %d", data, err, size-pageSize)
	}
}

// Whatever goes wrong when a guest is saved, it goes on, and no file is left.
func TestSaveFaults(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		call  string
		fault firecrackerfake.Fault
		want  string
	}{
		"pause is refused": {"PATCH /vm", firecrackerfake.FaultRefuse, "Firecracker refuses PATCH /vm"},
		"refused":          {"PUT /snapshot/create", firecrackerfake.FaultRefuse, "Firecracker refuses PUT /snapshot/create"},
		"breaks off":       {"PUT /snapshot/create", firecrackerfake.FaultDie, "the connection to Firecracker is broken"},
		"hangs":            {"PUT /snapshot/create", firecrackerfake.FaultHang, "context canceled"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRoom(t)
			instance := r.start(r.config(firecrackerfake.Behaviour{Call: test.call, Fault: test.fault}, nil))
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if test.fault == firecrackerfake.FaultHang {
				go func() {
					defer cancel()
					r.await(ctx, test.call)
				}()
			}
			opts := r.saveOptions()
			_, err := instance.(vmm.Saver).Save(ctx, opts) //nolint:forcetypeassert // it is one
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Save: %v, want %q", err, test.want)
			}
			for _, path := range []string{opts.Memory, opts.State} {
				if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left: %v", path, err)
				}
			}
			if test.fault == firecrackerfake.FaultDie {
				r.end(instance)
				return
			}
			channel, lines := r.open(instance)
			if _, err := fmt.Fprintln(channel, "awake"); err != nil || !lines.Scan() || lines.Text() != "awake" {
				t.Errorf("a guest that was not saved says %q, %v", lines.Text(), err)
			}
		})
	}
}

// A state of another release is an error that says so, and leaves nothing.
func TestRestoreOfAnotherRelease(t *testing.T) {
	t.Parallel()
	r := newRoom(t)
	instance := r.start(r.config(firecrackerfake.Behaviour{}, nil))
	opts := r.saveOptions()
	hold, err := instance.(vmm.Saver).Save(t.Context(), opts) //nolint:forcetypeassert // it is one
	if err != nil {
		t.Fatal(err)
	}
	hold.Keep()
	for want, edit := range map[string]func(*vmm.Config){
		"Firecracker refuses PUT /snapshot/load: Load snapshot error: Invalid data format version 1.12.1": func(*vmm.Config) {},
		"not of the VM's": func(c *vmm.Config) { c.MemoryMiB *= 2 },
		"no such file":    func(c *vmm.Config) { c.Restore.State += ".none" },
	} {
		child := newRoom(t)
		c := child.config(firecrackerfake.Behaviour{Version: "1.13.0"}, func(c *vmm.Config) {
			c.Restore = &vmm.Restore{Memory: opts.Memory, State: opts.State}
			edit(c)
		})
		instance, err := firecracker.New(firecracker.Options{}).Start(t.Context(), c)
		if instance != nil || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Start = %v, %v, want %q", instance, err, want)
		}
		child.clean()
	}
}

// Console and log may be renamed, and the VM's directory too, while the VM runs.
func TestDirectoryIsRenamed(t *testing.T) {
	t.Parallel()
	r := newRoom(t)
	work := filepath.Join(r.dir, "work")
	if err := os.Mkdir(work, 0o700); err != nil {
		t.Fatal(err)
	}
	instance := r.start(r.config(firecrackerfake.Behaviour{}, func(c *vmm.Config) { c.WorkDir = work }))
	moved := filepath.Join(r.dir, strings.Repeat("long", 30)) // for a socket's path
	if err := os.Rename(work, moved); err != nil {
		t.Fatal(err)
	}
	channel, lines := r.open(instance)
	if _, err := io.WriteString(channel, "here\n"); err != nil || !lines.Scan() || lines.Text() != "here" {
		t.Errorf("the guest says %q, %v", lines.Text(), err)
	}
	if err := instance.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(moved); err != nil || len(entries) != 0 {
		t.Errorf("left in the VM's directory: %v, %v", entries, err)
	}
}
