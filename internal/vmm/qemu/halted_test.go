package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
)

// scriptedQEMU answers on the control connection like a QEMU whose guest meets with an I/O
// error at some point of a saving.
type scriptedQEMU struct {
	conn *net.UnixConn
	// failsAt is the command after whose answer a request of the guest has failed; empty: none
	// does.
	failsAt string
	// gaveUp makes the migration fail.
	gaveUp bool

	mu       sync.Mutex
	commands []string
	running  bool
	stream   *os.File
}

// serve answers commands until the connection is closed.
func (q *scriptedQEMU) serve() {
	buffer, rights := make([]byte, 64<<10), make([]byte, 64)
	var text []byte
	for {
		n, oob, _, _, err := q.conn.ReadMsgUnix(buffer, rights)
		if err != nil || n == 0 {
			return
		}
		if messages, err := unix.ParseSocketControlMessage(rights[:oob]); err == nil && len(messages) == 1 {
			if fds, err := unix.ParseUnixRights(&messages[0]); err == nil {
				q.stream = os.NewFile(uintptr(fds[0]), "stream")
			}
		}
		text = append(text, buffer[:n]...)
		for {
			line, rest, found := bytes.Cut(text, []byte("\n"))
			if !found {
				break
			}
			text = rest
			q.answer(line)
		}
	}
}

func (q *scriptedQEMU) answer(line []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var asked request
	if json.Unmarshal(line, &asked) != nil {
		return
	}
	q.commands = append(q.commands, asked.Execute)
	var result any = struct{}{}
	switch asked.Execute {
	case "query-status":
		result = status{Running: q.running}
	case "cont":
		q.running = true
	case "stop":
		q.running = false
	case "query-migrate":
		result = map[string]any{"error-desc": "it was to fail"}
	}
	q.send(map[string]any{"return": result, "id": asked.ID})
	if asked.Execute == q.failsAt {
		q.send(map[string]any{"event": "BLOCK_IO_ERROR", "data": ioErrorEvent()})
	}
	if asked.Execute == "migrate" {
		_, _ = q.stream.Write(mebibyteStream())
		_ = q.stream.Close()
		state := stateCompleted
		if q.gaveUp {
			state = stateFailed
			q.send(map[string]any{"event": "RESUME"})
		} else {
			q.running = false
		}
		q.send(map[string]any{"event": "MIGRATION", "data": map[string]any{"status": state}})
	}
}

// ioErrorEvent is the data of the event that QEMU holds the guest as the disk is full.
func ioErrorEvent() map[string]any {
	return map[string]any{"action": "stop", "nospace": true, "node-name": "drive0", "reason": "No space left on device"}
}

func (q *scriptedQEMU) send(message any) {
	text, err := json.Marshal(message)
	if err == nil {
		_, _ = q.conn.Write(append(text, '\n'))
	}
}

// mebibyteStream is the migration stream of a guest with a mebibyte of zeros.
func mebibyteStream() []byte {
	var s stream
	s.header()
	s.section(markSectionStart).name("ram")
	s.u32(0)
	s.u32(ramVersion)
	s.u64(1<<20 | ramSize)
	s.name(ramID)
	s.u64(1 << 20)
	s.end()
	s.section(markSectionEnd).end()
	return s.Bytes()
}

// A guest that can't write to its drive, before it is saved or at any moment of it, is not
// saved: it would begin as one that does not run. It stays held, on the drives that it has.
func TestSaveOfHaltedGuest(t *testing.T) {
	for name, test := range map[string]struct {
		failsAt, want        string
		before, gaveUp, held bool
		not                  []string // commands
	}{
		"nothing fails":       {},
		"before the saving":   {before: true, want: "the host's disk is full (its drive vda)", not: []string{"migrate", "cont", "stop"}},
		"before the copying":  {failsAt: "migrate-set-parameters", want: "the host's disk is full", held: true, not: []string{"cont"}},
		"while it is held":    {failsAt: "migrate", want: "the host's disk is full", held: true, not: []string{"cont"}},
		"the migration fails": {gaveUp: true, want: "it was to fail", not: []string{"cont", "stop"}},
		"both fail":           {failsAt: "migrate", gaveUp: true, want: "the host's disk is full", held: true, not: []string{"cont"}},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs, err := pair()
			if err != nil {
				t.Fatal(err)
			}
			conn, err := net.FileConn(theirs)
			if err := errors.Join(err, theirs.Close()); err != nil {
				t.Fatal(err)
			}
			q := &scriptedQEMU{conn: conn.(*net.UnixConn), failsAt: test.failsAt, gaveUp: test.gaveUp, running: true} //nolint:forcetypeassert // that is what pair makes
			go q.serve()
			inst := &instance{
				cfg: vmm.Config{ID: "web", Accelerator: vmm.KVM, MemoryMiB: 1}, running: make(chan struct{}, 1),
				migration: make(chan string, maxStates), disks: map[int]string{}, done: make(chan struct{}),
				resumed: make(chan struct{}, 1), halts: make(chan vmm.Halt, 1),
			}
			if test.before {
				data, err := json.Marshal(ioErrorEvent())
				if err != nil {
					t.Fatal(err)
				}
				inst.handle(event{Name: "BLOCK_IO_ERROR", Data: data})
			}
			inst.qmp = newQMP(ours, inst.handle)
			defer func() { _, _ = ours.Close(), conn.Close() }()
			dir := t.TempDir()
			hold, err := inst.Save(t.Context(), vmm.SaveOptions{Memory: filepath.Join(dir, "memory"), State: filepath.Join(dir, "state")})
			if err == nil {
				_, err = hold.Release(t.Context())
			}
			q.mu.Lock()
			defer q.mu.Unlock()
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("Save: %v, want %q", err, test.want)
			}
			if (hold != nil) != (test.want == "") {
				t.Errorf("the hold is %+v", hold)
			}
			if q.running == test.held {
				t.Errorf("the guest runs: %v", q.running)
			}
			for _, command := range test.not {
				if slices.Contains(q.commands, command) {
					t.Errorf("QEMU was told to %s; all commands are %q", command, q.commands)
				}
			}
			if left, _ := os.ReadDir(dir); test.want != "" && len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// writing writes one block after the other, and counts them on the console.
const writing = `
i=0
while :; do
	dd if=/dev/zero of=/dev/vda bs=64k count=1 seek=$i conv=notrunc,fsync 2>/dev/null
	i=$((i + 1))
	echo "block $i" >/dev/console
	sleep 0.05
done
`

// As TestSaveOfHaltedGuest, in QEMU itself: the host's disk is full when the guest has just
// been found to run. When there is room again, the guest goes on and can be saved.
func TestSaveOnFullDisk(t *testing.T) {
	testenv.RequireQEMU(t)
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system takes root")
	}
	small, dir := t.TempDir(), t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=128m,mode=700"); err != nil {
		t.Skip("mounting is not allowed here: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	drive, filler := filepath.Join(small, "drive"), filepath.Join(small, "filler")
	if err := errors.Join(os.WriteFile(drive, nil, 0o600), os.Truncate(drive, 1<<30)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cfg := vmm.Config{
		ID: "full", Accelerator: vmm.TCG, VCPUs: 1, MemoryMiB: 128,
		Kernel: testenv.Kernel(t), Initrd: testenv.Initramfs(t, writing), BootArgs: "console=ttyS0 panic=1 quiet",
		Drives:      []vmm.Drive{{Path: drive, Format: "raw"}},
		ConsolePath: filepath.Join(dir, "console"), LogPath: filepath.Join(dir, "log"),
	}
	start := func() *instance {
		t.Helper()
		started, err := New(Options{}).Start(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		inst := started.(*instance) //nolint:forcetypeassert // it is one
		t.Cleanup(func() { _ = inst.Kill(context.Background()) })
		return inst
	}
	awaitBlocks := func(inst *instance, n int) {
		t.Helper()
		for strings.Count(inst.ConsoleTail(1<<20), "block ") < n {
			if ctx.Err() != nil || inst.ended() {
				t.Fatalf("the guest does not write; its console says: %s", inst.ConsoleTail(1<<10))
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	opts := vmm.SaveOptions{Memory: filepath.Join(dir, "memory"), State: filepath.Join(dir, "state")}
	refused := func(inst *instance) {
		t.Helper()
		if _, err := inst.Save(ctx, opts); err == nil || !strings.Contains(err.Error(), "the host's disk is full (its drive vda)") {
			t.Errorf("Save on a full disk: %v", err)
		}
		for _, path := range []string{opts.Memory, opts.State} {
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left: %v", path, err)
			}
		}
		var now status
		if err := inst.qmp.execute(ctx, "query-status", &now); err != nil || now.Running {
			t.Errorf("after that it is %+v, %v", now, err)
		}
	}

	inst := start()
	awaitBlocks(inst, 1)
	inst.findRAM = func(pid int, size int64, fromFile bool) (*guestRAM, error) { // when it has been found to run
		fillDisk(t, filler)
		select {
		case <-inst.Halts():
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return findRAM(pid, size, fromFile)
	}
	refused(inst)
	refused(inst) // it is halted from the beginning
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	inst.findRAM = findRAM
	if err := inst.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	awaitBlocks(inst, strings.Count(inst.ConsoleTail(1<<20), "block ")+2)
	hold, err := inst.Save(ctx, opts)
	if err != nil || hold.Saved().Held {
		t.Fatalf("Save when there is room: %+v, %v", hold, err)
	}
	if err := inst.Kill(ctx); err != nil { // who has the lock of the drive
		t.Fatal(err)
	}
	cfg.Restore = &vmm.Restore{Memory: opts.Memory, State: opts.State}
	cfg.ConsolePath += "-child"
	awaitBlocks(start(), 2)
}

// fillDisk is [testenv.FillDisk], and checks that it has done so.
func fillDisk(t *testing.T, path string) {
	t.Helper()
	testenv.FillDisk(t, path)
	file, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	if _, err := fmt.Fprint(file, "."); err == nil {
		t.Error("there is room left")
	}
}
