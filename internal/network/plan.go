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
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

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

// Modes that take a privilege.
const (
	// TAP connects the guest by a TAP interface of the host, which routes for it.
	TAP = smolvm.NetworkTAP
	// Bridge connects the guest by a TAP interface to a bridge of the host's administrator,
	// whose network gives it addresses.
	Bridge = smolvm.NetworkBridge
)

// UsesTAP reports whether guests are connected by TAP interfaces of the host in a mode.
func UsesTAP(mode smolvm.NetworkMode) bool { return mode == TAP || mode == Bridge }

// HasPolicies reports whether guests can have an egress policy in a mode: its network is an
// [EgressSetter].
func HasPolicies(mode smolvm.NetworkMode) bool {
	return mode == smolvm.NetworkUser || mode == smolvm.NetworkTAP
}

// UserMTU is the MTU in the mode user, in bytes, where the VMM can carry such packets. None of
// the guest's packets leaves this host, only what they carry does, so they may be as long as
// IPv4 lets them be (65535, less what aligns buffers), and there are the fewer of them.
const UserMTU = 65520

// DefaultPool returns the network that VMs on TAP interfaces have their addresses in if no
// other is asked for.
func DefaultPool() netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16}), 16) }

// Addresses are what follows from a VM's lease, in one mode.
type Addresses struct {
	Mode smolvm.NetworkMode
	// Lease is the index.
	Lease int
	// Guest is the guest's address, in the network Prefix. Gateway is the host's side of
	// that network, and DNS is where the guest has names resolved.
	// In the mode bridge none is known beforehand.
	Guest, Gateway, DNS netip.Addr
	Prefix              netip.Prefix
	// Guest6, Gateway6 and Prefix6 are the same of IPv6; not valid in modes without it. They
	// are unique local addresses (RFC 4193), and leave the host with its own in their place.
	Guest6, Gateway6 netip.Addr
	Prefix6          netip.Prefix
	// MAC is the hardware address of the guest's interface, the same in every mode: locally
	// administered (02), and ending in the bytes of the lease.
	MAC string
	// TAP is the name of the interface on the host: [TAPPrefix] and the lease's address in
	// the pool, so that VMs of pools that don't overlap have different ones. Empty in the
	// mode user.
	TAP string
	// CID is the VM's address on vsock; 0: it has none.
	CID uint32
}

// TAPPrefix is what the names of all TAP interfaces of VMs begin with.
const TAPPrefix = "smol-"

// Plan returns the addresses of the VM with a lease in the [DefaultPool]; see [PlanIn].
func Plan(mode smolvm.NetworkMode, lease int) (Addresses, error) {
	return PlanIn(DefaultPool(), mode, lease)
}

// PlanIn returns the addresses of the VM with a lease, by arithmetic alone. Empty stands for
// the mode user, whose addresses are in no pool. If the mode is not known, or the lease is
// none of that mode, Mode and Lease are all that is returned with the error. It matches
// [ErrPoolExhausted] if the pool has no address for the lease.
func PlanIn(pool netip.Prefix, mode smolvm.NetworkMode, lease int) (Addresses, error) {
	mode = cmp.Or(mode, smolvm.NetworkUser)
	none := Addresses{Mode: mode, Lease: lease}
	if lease < PlaceholderIndex || lease > LastIndex {
		return none, fmt.Errorf("plan a network: lease %d is not one of %d to %d", lease, FirstIndex, LastIndex)
	}
	a := none
	if mode != smolvm.NetworkNone {
		a.MAC = macOf(lease)
	}
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
		a.DNS = a.Gateway
		user := userNetwork6()
		a.Guest6, a.Gateway6, a.Prefix6 = user.Addr().Next().Next(), user.Addr().Next(), user
	case smolvm.NetworkNone:
	case TAP, Bridge:
		if err := a.inPool(pool); err != nil {
			return none, fmt.Errorf("plan a network: %w", err)
		}
	default:
		return none, fmt.Errorf("plan a network: %w: mode %q is not known", smolvm.ErrUnsupported, mode)
	}
	return a, nil
}

// ErrPoolExhausted matches the error of [PlanIn] for a lease that is beyond the pool.
var ErrPoolExhausted = errors.New("the pool of addresses is exhausted")

// CheckPool returns why a network can't be a pool of VMs' addresses.
func CheckPool(pool netip.Prefix) error {
	switch {
	case !pool.IsValid() || !pool.Addr().Is4():
		return fmt.Errorf("pool %s is no network of IPv4", pool)
	case pool != pool.Masked():
		return fmt.Errorf("pool %s has bits beyond its length; write %s", pool, pool.Masked())
	case pool.Bits() > 29:
		return fmt.Errorf("pool %s is too small; the smallest is a /29", pool)
	case pool.Bits() < 8:
		return fmt.Errorf("pool %s is too large; the largest is a /8", pool)
	case !pool.Addr().IsGlobalUnicast() || netip.MustParsePrefix("0.0.0.0/8").Overlaps(pool):
		return fmt.Errorf("pool %s has no addresses of hosts", pool)
	}
	return nil
}

// LastLease returns the highest lease that has an address in a pool.
func LastLease(pool netip.Prefix) int {
	// The last address of a network is for broadcasts.
	return min(1<<(32-pool.Bits())-2, LastIndex)
}

// inPool sets what follows from the lease in a pool.
func (a *Addresses) inPool(pool netip.Prefix) error {
	if err := CheckPool(pool); err != nil {
		return err
	}
	if last := LastLease(pool); a.Lease > last {
		return fmt.Errorf("%w: lease %d has no address in %s, which has room for %d VMs", ErrPoolExhausted, a.Lease, pool, last-FirstIndex+1)
	}
	if a.Lease == PlaceholderIndex {
		return fmt.Errorf("a guest of no VM has no address in the pool %s; see Standby", pool)
	}
	addr := poolAddr(pool, a.Lease)
	a.TAP = fmt.Sprintf("%s%x", TAPPrefix, addr.As4())
	if a.Mode == Bridge {
		return nil
	}
	a.Guest, a.Gateway, a.Prefix = addr, poolAddr(pool, PlaceholderIndex), pool
	a.DNS = a.Gateway
	a.Guest6, a.Gateway6 = toIPv6(a.Guest), toIPv6(a.Gateway)
	a.Prefix6 = netip.PrefixFrom(toIPv6(pool.Addr()), 96+pool.Bits())
	return nil
}

func poolAddr(pool netip.Prefix, index int) netip.Addr {
	base := pool.Addr().As4()
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(base[:])+uint32(index))))
}

// ULA returns the network of all addresses of IPv6 that are planned, whatever the pool.
func ULA() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0x73, 0x6d, 0x6f, 0x6c, 0x76}), 64)
}

// userNetwork6 returns the network of IPv6 of VMs in the mode user: in [ULA], and with no address
// that a pool would give.
func userNetwork6() netip.Prefix {
	bytes := ULA().Addr().As16()
	bytes[8] = 1
	return netip.PrefixFrom(netip.AddrFrom16(bytes), 96)
}

// toIPv6 returns the address in [ULA] that ends in an address of IPv4.
func toIPv6(addr netip.Addr) netip.Addr {
	bytes, last := ULA().Addr().As16(), addr.As4()
	copy(bytes[12:], last[:])
	return netip.AddrFrom16(bytes)
}

func macOf(lease int) string {
	ip := poolAddr(DefaultPool(), lease).As4()
	return net.HardwareAddr{0x02, 0x00, ip[0], ip[1], ip[2], ip[3]}.String()
}

// Public returns the addresses in the form in which users see them. What does not follow
// from the lease, as the host's ports, is left empty.
func (a Addresses) Public() smolvm.NetworkConfig {
	return smolvm.NetworkConfig{
		Mode: a.Mode, GuestIP: a.Guest, Gateway: a.Gateway, Prefix: a.Prefix,
		GuestIP6: a.Guest6, Gateway6: a.Gateway6, GuestMAC: a.MAC, TAP: a.TAP,
	}
}

// standbyPrefix is what the names of TAP interfaces begin with that no VM has yet. No address
// of a pool begins with it.
const standbyPrefix = TAPPrefix + "s"

// Standby returns the configuration of the network of a guest that belongs to no VM yet, on a
// TAP interface: the interface alone, which is down, by a name that follows from the random
// name of a run.
func Standby(run string) Config {
	name := standbyPrefix + run
	return Config{Mode: TAP, GuestMAC: macOf(PlaceholderIndex), TAP: name[:min(len(name), maxTAP)]}
}

// IsStandby reports whether a configuration is one of [Standby].
func (c Config) IsStandby() bool {
	return c.Mode == TAP && !c.Guest.IsValid() && strings.HasPrefix(c.TAP, standbyPrefix)
}

// maxTAP is how long the name of an interface may be (IFNAMSIZ less the NUL).
const maxTAP = 15

// Config returns what a VM's shim is told of its network.
func (a Addresses) Config() Config {
	return Config{
		Mode: a.Mode, Prefix: a.Prefix, Gateway: a.Gateway, Guest: a.Guest, GuestMAC: a.MAC,
		Prefix6: a.Prefix6, Gateway6: a.Gateway6, Guest6: a.Guest6, TAP: a.TAP,
	}
}
