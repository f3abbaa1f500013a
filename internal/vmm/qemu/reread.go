package qemu

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// rereadBatch is how many pages are read from QEMU at once. The kernel takes 1024 pieces
// (IOV_MAX), and what has been read should still be in the CPU's cache when it is compared.
const rereadBatch = 128

// errUnreadable is why the guest's memory can't be read from QEMU's process.
var errUnreadable = errors.New("the guest's memory can't be read from QEMU's process")

// guestRAM is the guest's memory as it lies in QEMU's process.
type guestRAM struct {
	pid   int
	start uintptr
	// Each holds rereadBatch pages. They are there before the guest is held.
	now, saved []byte
}

// findRAM finds the guest's memory in QEMU's process, and makes sure that it may be read.
// The error matches errUnreadable.
//
// A parent may read its child's memory, unless the host forbids that (Yama's
// ptrace_scope of 2 and more, a security module) or QEMU has made itself unreadable.
func findRAM(pid int, size int64, fromFile bool) (*guestRAM, error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnreadable, err)
	}
	defer func() { _ = maps.Close() }()
	start, err := mappingOf(maps, size, fromFile)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnreadable, err)
	}
	ram := &guestRAM{
		pid: pid, start: start,
		now: make([]byte, rereadBatch*ramPageSize), saved: make([]byte, rereadBatch*ramPageSize),
	}
	clear(ram.saved) // which makes the pages be there
	var first []int64
	for n := range min(rereadBatch, size/ramPageSize) {
		first = append(first, n*ramPageSize)
	}
	return ram, ram.read(first)
}

// mappingOf finds the guest's memory in the list of a process's mappings; see proc(5). It
// is the only private one of that size that may be written to, of a file or not.
func mappingOf(maps io.Reader, size int64, fromFile bool) (start uintptr, err error) {
	found := 0
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		var from, to, offset, inode uint64
		var mode, device string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s %x %s %d", &from, &to, &mode, &offset, &device, &inode); err != nil {
			return 0, err
		}
		if to-from == uint64(size) && strings.HasPrefix(mode, "rw-p") && offset == 0 && (inode != 0) == fromFile {
			start = uintptr(from)
			found++
		}
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	if found != 1 {
		return 0, fmt.Errorf("it has %d mappings that could be it", found)
	}
	return start, nil
}

// read reads the pages at some offsets, at most rereadBatch. The error matches
// errUnreadable.
func (r *guestRAM) read(offsets []int64) error {
	var remote []unix.RemoteIovec
	for _, offset := range offsets {
		base := r.start + uintptr(offset)
		if n := len(remote) - 1; n >= 0 && remote[n].Base+uintptr(remote[n].Len) == base {
			remote[n].Len += ramPageSize
			continue
		}
		remote = append(remote, unix.RemoteIovec{Base: base, Len: ramPageSize})
	}
	buffer := r.now[:len(offsets)*ramPageSize]
	local := []unix.Iovec{{Base: &buffer[0]}}
	local[0].SetLen(len(buffer))
	n, err := unix.ProcessVMReadv(r.pid, local, remote, 0)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", errUnreadable, os.NewSyscallError("process_vm_readv", err))
	case n != len(buffer):
		return fmt.Errorf("%w: %d of %d bytes were read", errUnreadable, n, len(buffer))
	}
	return nil
}

// compare compares pages of the saved memory with the guest's, calls differs for each
// that is not the same, and returns how many there are.
func (w *pageWriter) compare(ram *guestRAM, offsets []int64, differs func(offset int64, now []byte) error) (n int, err error) {
	if err := w.flush(); err != nil {
		return 0, err
	}
	for len(offsets) > 0 {
		batch := offsets[:min(len(offsets), rereadBatch)]
		offsets = offsets[len(batch):]
		if err := ram.read(batch); err != nil {
			return n, err
		}
		if err := w.read(ram.saved, batch); err != nil {
			return n, err
		}
		for i, offset := range batch {
			now := ram.now[i*ramPageSize:][:ramPageSize]
			if bytes.Equal(now, ram.saved[i*ramPageSize:][:ramPageSize]) {
				continue
			}
			n++
			if err := differs(offset, now); err != nil {
				return n, err
			}
		}
	}
	return n, w.flush()
}

// correct replaces the pages whose copies are out of date, and returns how many.
func (w *pageWriter) correct(ram *guestRAM, unsafe []int64) (stale int, err error) {
	return w.compare(ram, unsafe, w.put)
}

// check checks that what is read is the guest's memory, on pages whose copies are known to
// be right.
func (w *pageWriter) check(ram *guestRAM, log *pageLog) error {
	sample := log.sample(func(page int64) bool { return !w.written[page] })
	_, err := w.compare(ram, sample, func(offset int64, _ []byte) error {
		return fmt.Errorf("%w: what is there is not what was saved, at %#x", errUnreadable, offset)
	})
	return err
}

// read reads pages of the file. What is a hole is not looked at: that would fill it, in
// some file systems.
func (w *pageWriter) read(buffer []byte, offsets []int64) error {
	for n := 0; n < len(offsets); {
		if !w.written[offsets[n]/ramPageSize] {
			clear(buffer[n*ramPageSize:][:ramPageSize])
			n++
			continue
		}
		run := 1
		for n+run < len(offsets) && offsets[n+run] == offsets[n]+int64(run)*ramPageSize && w.written[offsets[n+run]/ramPageSize] {
			run++
		}
		if _, err := w.file.ReadAt(buffer[n*ramPageSize:][:run*ramPageSize], offsets[n]); err != nil {
			return err
		}
		n += run
	}
	return nil
}
