package qemu

import (
	"os"

	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/tap"
)

// openLink returns the file by which QEMU reaches the other end of a network interface, and
// what is to be called when QEMU has inherited it. QEMU needs no right to open a TAP
// interface, and that is the one of this thread's network namespace.
func openLink(nic vmm.NIC) (file *os.File, release func(), err error) {
	if err := nic.Validate(); err != nil {
		return nil, nil, err
	}
	if nic.Link != nil {
		return nic.Link, func() {}, nil // the caller's own
	}
	if file, err = tap.Open(nic.TAP); err != nil {
		return nil, nil, err
	}
	return file, func() { _ = file.Close() }, nil
}
