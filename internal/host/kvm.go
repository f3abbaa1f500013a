package host

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Requests and constants of the kernel's KVM interface, from linux/kvm.h and
// Documentation/virt/kvm/api.rst.
const (
	kvmGetAPIVersion   = 0xae00
	kvmCreateVM        = 0xae01
	kvmGetVCPUMmapSize = 0xae04
	kvmCreateVCPU      = 0xae41

	kvmAPIVersion = 12 // the only one since Linux 2.6.22
)

// vm is a VM with one virtual CPU, as far as it has been made.
type vm struct {
	kvm, fd, vcpu *os.File
	// run is shared with the kernel: struct kvm_run.
	run []byte
}

// newVM makes a VM and its virtual CPU.
func newVM(device string) (_ *vm, err error) {
	v := &vm{}
	defer func() {
		if err != nil {
			v.close()
		}
	}()
	if v.kvm, err = os.OpenFile(device, os.O_RDWR, 0); err != nil {
		return nil, fmt.Errorf("KVM can't be used: %w", err)
	}
	version, err := ioctl(v.kvm, kvmGetAPIVersion, 0)
	if err != nil {
		return nil, fmt.Errorf("%s is not KVM: %w", device, err)
	}
	if version != kvmAPIVersion {
		return nil, fmt.Errorf("KVM has version %d of its interface, not %d", version, kvmAPIVersion)
	}
	if v.fd, err = create(v.kvm, kvmCreateVM, "VM"); err != nil {
		return nil, err
	}
	if v.vcpu, err = create(v.fd, kvmCreateVCPU, "virtual CPU"); err != nil {
		return nil, err
	}
	size, err := ioctl(v.kvm, kvmGetVCPUMmapSize, 0)
	if err != nil {
		return nil, fmt.Errorf("KVM can't share a virtual CPU: %w", err)
	}
	v.run, err = unix.Mmap(int(v.vcpu.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("KVM can't share a virtual CPU: %w", err)
	}
	return v, nil
}

// create makes the thing that request is about.
func create(parent *os.File, request uintptr, what string) (*os.File, error) {
	fd, err := ioctl(parent, request, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("KVM can't make a %s: another hypervisor holds the CPU: %w", what, err)
	}
	if err != nil {
		return nil, fmt.Errorf("KVM can't make a %s: %w", what, err)
	}
	return os.NewFile(uintptr(fd), what), nil
}

func (v *vm) close() {
	if v.run != nil {
		_ = unix.Munmap(v.run)
	}
	for _, file := range []*os.File{v.vcpu, v.fd, v.kvm} {
		if file != nil {
			_ = file.Close()
		}
	}
}

// ioctl makes a request whose argument is a plain number.
func ioctl(file *os.File, request, argument uintptr) (int, error) {
	result, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), request, argument)
	if errno != 0 {
		return 0, errno
	}
	return int(result), nil
}
