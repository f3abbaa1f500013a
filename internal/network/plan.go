// Package network is what all ways to connect a VM have in common, as pure functions and
// plain data: the addresses that follow from a VM's lease ([Plan]), what a guest may reach
// ([Policy]), and what a VM's shim needs of a network ([Attachment]). Each way is a package
// below this one; docs/architecture.md draws where they meet.
//
// A lease is an index, unique among the VMs of a data directory, so that nothing but the
// index need be stored. No two indexes share a value of anything that follows from them and
// that others could see.
package network

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"

	"github.com/smolvm/smolvm"
)

// The range of leases. In the pool of addresses, index 0 would be the network's own
// address, 1 is the host's, and 65535 would be the broadcast address.
const (
	FirstIndex = 2
	LastIndex  = 65534
	// PlaceholderIndex is the lease of a guest that belongs to no VM yet: one that a
	// template is made of, or that stands by.
	PlaceholderIndex = FirstIndex - 1
)

// TAP connects the guest by a TAP interface of the host, which takes a privilege. No shim
// knows this mode yet.
const TAP smolvm.NetworkMode = "tap"

// Addresses are what follows from a VM's lease, in one mode.
type Addresses struct {
	Mode smolvm.NetworkMode
	// Lease is the index.
	Lease int
	// Guest is the guest's address, in the network Prefix. Gateway is the host's side of
	// that network, and DNS is where the guest has names resolved.
	Guest, Gateway, DNS netip.Addr
	Prefix              netip.Prefix
	// MAC is the hardware address of the guest's interface, the same in every mode: locally
	// administered (02), and ending in the bytes of the lease.
	MAC string
	// TAP is the name of the interface on the host; empty in the mode user.
	TAP string
	// CID is the VM's address on vsock; 0: it has none.
	CID uint32
}

// Plan returns the addresses of the VM with a lease, by arithmetic alone. Empty stands for
// the mode user. If the mode is not known, or the lease is none of that mode, Mode and Lease
// are all that is returned with the error.
func Plan(mode smolvm.NetworkMode, lease int) (Addresses, error) {
	mode = cmp.Or(mode, smolvm.NetworkUser)
	none := Addresses{Mode: mode, Lease: lease}
	if lease < PlaceholderIndex || lease > LastIndex {
		return none, fmt.Errorf("plan a network: lease %d is not one of %d to %d", lease, FirstIndex, LastIndex)
	}
	a := none
	a.MAC = macOf(lease)
	if lease != PlaceholderIndex {
		// The kernel keeps 0 to 2 for itself (VMADDR_CID_HYPERVISOR, _LOCAL and _HOST).
		a.CID = uint32(lease) + 1
	}
	switch mode {
	case smolvm.NetworkUser:
		// Each VM has a network of its own, so all have the same addresses: those of QEMU's
		// own user network.
		a.Guest = netip.AddrFrom4([4]byte{10, 0, 2, 15})
		a.Gateway = netip.AddrFrom4([4]byte{10, 0, 2, 2})
		a.Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 2, 0}), 24)
	case TAP:
		if lease == PlaceholderIndex {
			return none, fmt.Errorf("plan a network: a guest of no VM has no address in the pool %s", pool())
		}
		a.Guest, a.Gateway, a.Prefix = poolAddr(lease), poolAddr(PlaceholderIndex), pool()
		// 15 characters are what the kernel allows (IFNAMSIZ less the NUL).
		a.TAP = fmt.Sprintf("smol%d", lease)
	default:
		return none, fmt.Errorf("plan a network: %w: mode %q is not known", smolvm.ErrUnsupported, mode)
	}
	a.DNS = a.Gateway
	return a, nil
}

// pool is the network that VMs on TAP interfaces share.
func pool() netip.Prefix { return netip.PrefixFrom(poolAddr(0), 16) }

func poolAddr(index int) netip.Addr {
	return netip.AddrFrom4([4]byte{172, 16, byte(index >> 8), byte(index)})
}

func macOf(lease int) string {
	ip := poolAddr(lease).As4()
	return net.HardwareAddr{0x02, 0x00, ip[0], ip[1], ip[2], ip[3]}.String()
}

// Public returns the addresses in the form in which users see them. What does not follow
// from the lease, as the host's ports, is left empty.
func (a Addresses) Public() smolvm.NetworkConfig {
	return smolvm.NetworkConfig{Mode: a.Mode, GuestIP: a.Guest, Gateway: a.Gateway, Prefix: a.Prefix, GuestMAC: a.MAC}
}

// Config returns what a VM's shim is told of its network.
func (a Addresses) Config() Config {
	return Config{Mode: a.Mode, Prefix: a.Prefix, Gateway: a.Gateway, Guest: a.Guest, GuestMAC: a.MAC}
}
