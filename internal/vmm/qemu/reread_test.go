package qemu

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/vmmtest"
)

func TestMappingOf(t *testing.T) {
	const (
		anonymous = "7f0000000000-7f0020000000 rw-p 00000000 00:00 0\n"
		file      = "7f1000000000-7f1020000000 rw-p 00000000 fe:01 77                    /tmp/a b/memory (deleted)\n"
		code      = "7f2000000000-7f2020000000 rwxp 00000000 00:00 0\n"
		library   = "7f3000000000-7f3020000000 r--p 00000000 fe:01 78  /lib/libc.so\n"
		later     = "7f4000000000-7f4020000000 rw-p 00001000 fe:01 77  /tmp/memory\n"
		syscalls  = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]\n"
	)
	for _, test := range []struct {
		name, maps string
		fromFile   bool
		want       uintptr // 0: an error
	}{
		{"booted", code + anonymous + library + syscalls, false, 0x7f0000000000},
		{"restored", code + anonymous + file + later, true, 0x7f1000000000},
		{"two", anonymous + strings.Replace(anonymous, "7f0", "7f5", 2), false, 0},
		{"none", code + library + file, false, 0},
		{"no list", "something else\n", false, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := mappingOf(strings.NewReader(test.maps), 512<<20, test.fromFile)
			if got != test.want || (err == nil) != (test.want != 0) {
				t.Errorf("found %#x, %v; want %#x", got, err, test.want)
			}
		})
	}
}

// ownRAM makes memory of this process that can be read like a guest's.
func ownRAM(t *testing.T, pages ...[]byte) (*guestRAM, []byte) {
	t.Helper()
	memory := slices.Concat(pages...)
	return &guestRAM{
		pid: os.Getpid(), start: uintptr(unsafe.Pointer(&memory[0])),
		now: make([]byte, rereadBatch*ramPageSize), saved: make([]byte, rereadBatch*ramPageSize),
	}, memory
}

// looksOf answers as often as it is given answers, and then that QEMU has looked again.
func looksOf(answers ...looks) func() looks {
	return func() looks {
		if len(answers) == 0 {
			return lookedAgain
		}
		answer := answers[0]
		answers = answers[1:]
		return answer
	}
}

// Unsafe are pages that came live after the last time that QEMU was known to have looked
// but once, and that did not come again while the guest was held.
func TestPageLog(t *testing.T) {
	var asked, enough int
	log := pageLog{last: make([]uint32, maxUnsafe+4*lookStep), enough: func() { enough++ }}
	answer := looksOf(lookedOnce, looksUnknown, lookedOnce, looksUnknown)
	log.look = func() looks { asked++; return answer() }
	for page := range int64(5 * lookStep) {
		if err := log.note(page, false); err != nil {
			t.Fatal(err)
		}
	}
	if log.safe != 3*lookStep || asked != 5 || log.look != nil {
		t.Fatalf("%d are safe after %d questions", log.safe, asked)
	}
	// One of the safe ones comes again, and two come while the guest is held.
	for _, again := range []struct {
		page int64
		held bool
	}{{7, false}, {8, true}, {4 * lookStep, true}} {
		if err := log.note(again.page, again.held); err != nil {
			t.Fatal(err)
		}
	}
	want := []int64{7 * ramPageSize}
	for page := range int64(2 * lookStep) {
		if page != lookStep {
			want = append(want, (3*lookStep+page)*ramPageSize)
		}
	}
	if got := log.unsafe(); !slices.Equal(got, want) {
		t.Errorf("%d pages are unsafe, want %d", len(got), len(want))
	}
	unsafe := map[int64]bool{}
	for _, offset := range want {
		unsafe[offset] = true
	}
	hole := func(page int64) bool { return page < lookStep && page != 8 }
	sample := log.sample(hole)
	if len(sample) < 10 || sample[0] != 8*ramPageSize || sample[1] != 4*lookStep*ramPageSize {
		t.Errorf("the sample is %d pages, %v", len(sample), sample[:min(len(sample), 2)])
	}
	for _, offset := range sample[2:] {
		if unsafe[offset] || hole(offset/ramPageSize) {
			t.Errorf("the sample has %#x", offset)
		}
	}
	if enough != 0 {
		t.Error("the guest is held too early")
	}
	for page := range int64(maxUnsafe) {
		if err := log.note(page, false); err != nil {
			t.Fatal(err)
		}
	}
	if enough != 1 {
		t.Errorf("it was said %d times that the guest must be held", enough)
	}
}

// pagesStream is a stream in which page 1 and 2 are out of date, one of them a hole, and
// page 3 is sent while the guest is held.
func pagesStream() *stream {
	var s stream
	s.header().start()
	s.section(markSectionPart).
		page(ramID, 0, ramPage, page('a')...).
		page("", 1, ramPage, page('b')...).
		page("", 2, ramZero, 0).
		end()
	s.section(markSectionEnd).page(ramID, 3, ramPage, page('d')...).end()
	return &s
}

// splitPages splits a stream whose memory is corrected from ram, and ends with so many bytes
// of devices.
func splitPages(t *testing.T, ram *guestRAM, devices int) (*saving, error) {
	t.Helper()
	memory, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = memory.Close() })
	if err := memory.Truncate(testMemory); err != nil {
		t.Fatal(err)
	}
	ours, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ours.Close() }()
	written := make(chan error, 1)
	go func() {
		_, err := theirs.Write(append(pagesStream().Bytes(), make([]byte, devices)...))
		written <- errors.Join(err, theirs.Close())
	}()
	if devices < sendBuffer { // all of it is there before any is read
		if err := <-written; err != nil {
			t.Fatal(err)
		}
	}
	s := &saving{memory: memory, ram: ram, stream: ours}
	s.splitter = newSplitter(s, io.Discard, memory)
	return s, s.split()
}

// Copies that are out of date are put right, and no others are touched.
func TestMend(t *testing.T) {
	ram, memory := ownRAM(t, page('a'), page('B'), page('C'), page('d'), page(0), page(0), page(0), page(0))
	s, err := splitPages(t, ram, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if s.reread != 3 || s.stale != 2 {
		t.Errorf("%d pages were reread and %d stale, want 3 and 2", s.reread, s.stale)
	}
	if got, err := os.ReadFile(s.memory.Name()); err != nil || !bytes.Equal(got, memory) {
		t.Errorf("the memory is not the guest's: %v", err)
	}
}

// What QEMU has in its memory is not relied on if it may have gone on meanwhile, or if it
// is not what QEMU has sent.
func TestMendRefused(t *testing.T) {
	ram, _ := ownRAM(t, page('a'), page('B'), page('C'), page('d'), page(0), page(0), page(0), page(0))
	if _, err := splitPages(t, ram, 1<<10); !errors.Is(err, errNotHeld) {
		t.Errorf("all had been written: %v, want %v", err, errNotHeld)
	}
	ram, _ = ownRAM(t, page('a'), page('B'), page('C'), page('D'), page(0), page(0), page(0), page(0))
	if _, err := splitPages(t, ram, 0); !errors.Is(err, errUnreadable) {
		t.Errorf("other memory: %v, want %v", err, errUnreadable)
	}
	ram.start = 1 << 12
	if _, err := splitPages(t, ram, 0); !errors.Is(err, errUnreadable) {
		t.Errorf("no memory: %v, want %v", err, errUnreadable)
	}
}

// patched is a backend whose instances can't read QEMU's memory as they do.
type patched struct {
	*Backend
	findRAM func(pid int, size int64, fromFile bool) (*guestRAM, error)
}

func (p patched) Start(ctx context.Context, cfg vmm.Config) (vmm.Instance, error) {
	inst, err := p.Backend.Start(ctx, cfg)
	if err == nil {
		inst.(*instance).findRAM = p.findRAM
	}
	return inst, err
}

// Where QEMU's memory can't be read, or what is read turns out to be something else,
// guests are saved as well; it takes longer.
func TestSaveWithoutRereading(t *testing.T) {
	testenv.RequireQEMU(t)
	for name, test := range map[string]struct {
		find  func(pid int, size int64, fromFile bool) (*guestRAM, error)
		check func(vmm.Saved) error
	}{
		"forbidden": {
			func(int, int64, bool) (*guestRAM, error) { return nil, errUnreadable },
			func(saved vmm.Saved) error {
				if !saved.Early {
					return errors.New("the guest was not held early")
				}
				return nil
			},
		},
		"other memory": {
			func(pid int, size int64, fromFile bool) (*guestRAM, error) {
				ram, err := findRAM(pid, size, fromFile)
				if err == nil {
					ram.start += 16 << 20
				}
				return ram, err
			},
			// It is not looked at if no copy is in doubt, as on an idle host.
			func(saved vmm.Saved) error {
				if !saved.Early && saved.Reread > 0 {
					return errors.New("what is not the guest's memory was taken for it")
				}
				return nil
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			vmmtest.SaveBusy(t, patched{New(Options{}), test.find}, vmmtest.Assets{
				Kernel: testenv.Kernel(t), Initrd: testenv.Initramfs, Accelerator: vmm.TCG, BusySaves: 2, CheckSave: test.check,
			})
		})
	}
}
