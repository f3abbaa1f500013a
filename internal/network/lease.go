// Package network derives all the addresses of a VM from its lease, so that
// nothing but the lease need be stored.
//
// A lease is an index, unique among the VMs of a data directory. These are pure
// functions of it: no two indexes share a value of any of them.
package network

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/smolvm/smolvm"
)

// The range of lease indexes. In 172.16.0.0/16, index 0 would be the network's
// own address, 1 is the host's, and 65535 would be the broadcast address. Outside
// this range, what the functions of this package return has no meaning.
const (
	FirstIndex = 2
	LastIndex  = 65534
)

// TAP connects the guest by a TAP interface of the host, which takes a privilege. No shim
// knows this mode yet.
const TAP smolvm.NetworkMode = "tap"

// User is the network of a VM that is connected by a user-space TCP/IP stack. Each
// VM has a network of its own there, so the addresses are the same for all of
// them, and the same as those of QEMU's own user network. What is not derived from
// the index (the host's ports) is left empty.
func User(index int) smolvm.NetworkConfig {
	return smolvm.NetworkConfig{
		Mode:     smolvm.NetworkUser,
		GuestIP:  netip.AddrFrom4([4]byte{10, 0, 2, 15}),
		Gateway:  netip.AddrFrom4([4]byte{10, 0, 2, 2}),
		Prefix:   netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 2, 0}), 24),
		GuestMAC: MAC(index),
	}
}

// GuestIP is the guest's address in 172.16.0.0/16, the network that VMs on TAP
// interfaces share.
func GuestIP(index int) netip.Addr {
	return netip.AddrFrom4([4]byte{172, 16, byte(index >> 8), byte(index)})
}

// MAC is the hardware address of the guest's interface, in whichever mode it is
// connected: locally administered (02), and ending in the bytes of [GuestIP].
func MAC(index int) string {
	ip := GuestIP(index).As4()
	return net.HardwareAddr{0x02, 0x00, ip[0], ip[1], ip[2], ip[3]}.String()
}

// TAPName is the name of the VM's TAP interface on the host. It is well below the
// kernel's limit of 15 characters (IFNAMSIZ less the NUL).
func TAPName(index int) string { return fmt.Sprintf("smol%d", index) }

// CID is the VM's address on vsock. The kernel keeps 0 to 2 for itself
// (VMADDR_CID_HYPERVISOR, _LOCAL and _HOST), so the first index has CID 3.
func CID(index int) uint32 { return uint32(index) + 1 }
