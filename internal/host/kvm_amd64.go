package host

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests for x86, from linux/kvm.h; the third and fourth digit are the size of
// the structure that is passed.
const (
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmSetTSSAddr          = 0xae47
	kvmRun                 = 0xae80
	kvmGetRegs             = 0x8090ae81
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	kvmExitHLT = 5

	// Offsets in struct kvm_run.
	runImmediateExit = 1
	runExitReason    = 8
)

// The structures that are passed, from linux/kvm.h and asm/kvm.h. What is blank
// stays as KVM gave it to us.
type (
	// userMemoryRegion is struct kvm_userspace_memory_region.
	userMemoryRegion struct {
		slot, flags                uint32
		guestAddr, size, userspace uint64
	}

	// regs is struct kvm_regs.
	regs struct {
		_           [2]uint64 // rax, rbx
		rcx         uint64
		_           [13]uint64 // rdx to r15
		rip, rflags uint64
	}

	// segment is struct kvm_segment.
	segment struct {
		base          uint64
		limit         uint32
		selector      uint16
		kind, present uint8
		_             uint8 // privilege level
		db, s, l, g   uint8
		_             [3]uint8 // available, unusable, padding
	}

	// sregs is struct kvm_sregs.
	sregs struct {
		cs, ds, es, fs, gs, ss segment
		_                      [2]segment // tr, ldt
		_                      [4]uint64  // gdt, idt
		cr0                    uint64
		_                      uint64 // cr2
		cr3, cr4               uint64
		_                      uint64 // cr8
		efer                   uint64
		_                      [5]uint64 // apic_base, interrupt_bitmap
	}
)

// The guest's memory: its program, then the three tables that map the first 2 MiB
// of addresses to themselves.
const (
	pageSize   = 4096
	pml4       = 1 * pageSize
	pdpt       = 2 * pageSize
	pageDir    = 3 * pageSize
	memorySize = 4 * pageSize
)

// program counts down in 64-bit mode, in which a kernel spends its life, too; real
// mode would tell less, as older processors need it emulated.
var program = [...]byte{
	0xff, 0xc9, // dec ecx
	0x75, 0xfc, // jnz to the dec
	0xf4,       // hlt, which gives the CPU back to us
	0xeb, 0xfd, // jmp to the hlt
}

// probe runs a loop on KVM, cut off after limit, and fails with a [*slowError] if
// that comes first. It returns how fast that and the guest's exits were.
func probe(device string, iterations int, limit time.Duration) (measured, error) {
	// What cuts it off is a signal to its thread. SIGURG does the rest of the
	// program no harm: the runtime interrupts goroutines by it, too.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	v, err := newVM(device)
	if err != nil {
		return measured{}, err
	}
	defer v.close()
	memory, err := unix.Mmap(-1, 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return measured{}, fmt.Errorf("map memory for a test of KVM: %w", err)
	}
	defer func() { _ = unix.Munmap(memory) }()
	if err := v.load(memory, iterations); err != nil {
		return measured{}, fmt.Errorf("KVM can't set up a guest: %w", err)
	}
	return v.count(iterations, limit)
}

// load puts the program into the guest's memory and the virtual CPU at its start.
func (v *vm) load(memory []byte, iterations int) error {
	copy(memory, program[:])
	const present, writable, large = 1, 2, 0x80
	binary.LittleEndian.PutUint64(memory[pml4:], pdpt|present|writable)
	binary.LittleEndian.PutUint64(memory[pdpt:], pageDir|present|writable)
	binary.LittleEndian.PutUint64(memory[pageDir:], 0|present|writable|large)

	// Three pages of the guest's that KVM needs for itself on Intel processors;
	// where QEMU has them, below the firmware.
	if _, err := ioctl(v.fd, kvmSetTSSAddr, 0xfffbd000); err != nil {
		return err
	}
	region := userMemoryRegion{
		slot: 0, flags: 0, guestAddr: 0, size: memorySize,
		userspace: uint64(uintptr(unsafe.Pointer(&memory[0]))),
	}
	if err := ioctlStruct(v.fd, kvmSetUserMemoryRegion, &region); err != nil {
		return err
	}
	var special sregs
	if err := ioctlStruct(v.vcpu, kvmGetSregs, &special); err != nil {
		return err
	}
	// 64-bit mode; see the Intel manual, volume 3, "Initializing IA-32e Mode".
	special.cr0 = 1<<31 | 1<<0 // paging, protection
	special.cr3 = pml4
	special.cr4 = 1 << 5        // physical address extension
	special.efer = 1<<10 | 1<<8 // long mode active, enabled
	const code, data = 11, 3    // types of segments: execute or write, read, accessed
	special.cs.flat(8, code)
	special.cs.db, special.cs.l = 0, 1 // 64-bit code
	for _, s := range []*segment{&special.ds, &special.es, &special.fs, &special.gs, &special.ss} {
		s.flat(16, data)
	}
	if err := ioctlStruct(v.vcpu, kvmSetSregs, &special); err != nil {
		return err
	}
	var general regs
	if err := ioctlStruct(v.vcpu, kvmGetRegs, &general); err != nil {
		return err
	}
	general.rip, general.rcx = 0, uint64(iterations)
	general.rflags = 1 << 1 // always set
	return ioctlStruct(v.vcpu, kvmSetRegs, &general)
}

// flat makes a segment of all addresses.
func (s *segment) flat(selector uint16, kind uint8) {
	s.base, s.limit, s.selector, s.kind = 0, 0xffffffff, selector, kind
	s.present, s.db, s.s, s.g = 1, 1, 1, 1
}

// count runs the program, on this thread.
func (v *vm) count(iterations int, limit time.Duration) (speed measured, err error) {
	began := time.Now()
	deadline := began.Add(limit)
	pid, thread := os.Getpid(), unix.Gettid()
	cut := make(chan struct{})
	timer := time.AfterFunc(limit, func() {
		// The flag is for a thread that is not in the guest yet; the signal, for
		// one that is.
		v.run[runImmediateExit] = 1
		_ = unix.Tgkill(pid, thread, unix.SIGURG)
		close(cut)
	})
	defer func() {
		// Once it has begun, it needs v.run and the thread until it is done.
		if !timer.Stop() {
			<-cut
		}
	}()
	if halted, err := v.untilHalt(deadline); err != nil || !halted {
		return speed, cmp.Or(err, v.slow(iterations))
	}
	speed.Loop = time.Since(began)
	speed.Exit = limit // unless one is seen
	for range probeExits {
		entered := time.Now()
		if halted, err := v.untilHalt(deadline); err != nil || !halted {
			return speed, err
		}
		speed.Exit = min(speed.Exit, time.Since(entered))
	}
	return speed, nil
}

// untilHalt runs the guest, and reports whether it has halted before it was cut off.
func (v *vm) untilHalt(deadline time.Time) (halted bool, err error) {
	for {
		_, err := ioctl(v.vcpu, kvmRun, 0)
		reason := binary.NativeEndian.Uint32(v.run[runExitReason:])
		switch {
		case err == nil && reason == kvmExitHLT:
			return true, nil
		case err == nil:
			return false, fmt.Errorf("KVM can't run a guest: it gave up for reason %d", reason)
		case !errors.Is(err, unix.EINTR):
			return false, fmt.Errorf("KVM can't run a guest: %w", err)
		case !time.Now().Before(deadline):
			return false, nil
		}
	}
}

// slow says how far the program has come.
func (v *vm) slow(iterations int) error {
	var now regs
	if err := ioctlStruct(v.vcpu, kvmGetRegs, &now); err != nil {
		return fmt.Errorf("KVM can't tell where a guest is: %w", err)
	}
	left := int(min(now.rcx, uint64(iterations)))
	return &slowError{done: iterations - left, of: iterations}
}

// ioctlStruct makes a request whose argument is a structure.
func ioctlStruct[T any](file *os.File, request uintptr, argument *T) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), request, uintptr(unsafe.Pointer(argument)))
	if errno != 0 {
		return errno
	}
	return nil
}
