package vmm

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
)

// NIC is a network interface. Its other end is a Link or a TAP, one of the two. A guest that
// was saved with one kind is restored with the same: they offer it different features.
type NIC struct {
	MAC string `json:"mac"`
	// MTU in bytes that the device offers to the guest. Zero: 1500. Devices of some VMMs,
	// Firecracker's before 1.16, can't offer any: the guest's agent sets it, or nobody does.
	MTU int `json:"mtu,omitempty"`
	// Link is the VMM's end of a pair of connected unix datagram sockets, each
	// datagram one Ethernet frame. Start duplicates it: the caller closes its
	// own copy. It does not cross processes by JSON.
	Link *os.File `json:"-"`
	// TAP names a TAP interface of one queue in the network namespace of the thread that
	// calls Start. It is there already, may be used by this user, and is nobody else's
	// while the VMM runs. Addresses, routes, and that it is up, are the caller's.
	TAP string `json:"tap,omitempty"`
}

// maxInterfaceName is how many bytes Linux takes for the name of an interface (IFNAMSIZ,
// less the NUL).
const maxInterfaceName = 15

// Validate returns what keeps a VM from being given the interface, nil if nothing does.
func (n NIC) Validate() error {
	var err error
	switch {
	case n.Link != nil && n.TAP != "":
		err = fmt.Errorf("it has a link and the TAP interface %q; give it one of the two", n.TAP)
	case n.Link == nil && n.TAP == "":
		err = errors.New("it has neither a link nor a TAP interface; give it one of the two")
	case n.TAP != "" && !isInterfaceName(n.TAP):
		err = fmt.Errorf("%q is no name of a TAP interface, which has at most %d letters, digits, and characters of \"._-\"", n.TAP, maxInterfaceName)
	case n.MTU < 0:
		err = fmt.Errorf("an MTU of %d bytes is negative", n.MTU)
	}
	if _, macErr := net.ParseMAC(n.MAC); err == nil {
		err = macErr
	}
	if err != nil {
		return fmt.Errorf("network interface of the VM: %w", err)
	}
	return nil
}

// isInterfaceName reports whether a name can be that of an interface. The kernel takes more,
// some of which it or a VMM would give a meaning.
func isInterfaceName(name string) bool {
	const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
	return name != "." && name != ".." && len(name) <= maxInterfaceName && strings.Trim(name, allowed) == ""
}
