package smolvm

import (
	"fmt"
	"net/netip"
	"strings"
)

// Network says how a VM is connected. The zero value is the user network.
type Network struct {
	// Mode is the way. Empty: [NetworkUser]. It stays as it is for the life of the VM, and is
	// that of its forks and of what is restored from its snapshots.
	Mode NetworkMode `json:"mode,omitempty"`
	// Bridge is the name of the host's bridge that the guest is connected to, in
	// [NetworkBridge] only.
	Bridge string `json:"bridge,omitempty"`
	// Pool is the network of IPv4 that the VM has its address in, in [NetworkTAP] only; its
	// first address is the host's. Pools of one data directory do not overlap. Not valid: that
	// of the data directory, which is 172.16.0.0/16 unless the host has routes into that.
	Pool netip.Prefix `json:"pool,omitzero"`
	// OpenToVMs lets the guest reach other guests that are open, and them reach it: in
	// [NetworkTAP] all of the host, in [NetworkBridge] those on the same bridge.
	OpenToVMs bool `json:"open_to_vms,omitempty"`
	// ReceiveBitsPerSecond and SendBitsPerSecond are how much the guest may receive and send.
	// Zero: as much as can be carried.
	ReceiveBitsPerSecond int64 `json:"receive_bits_per_second,omitempty"`
	SendBitsPerSecond    int64 `json:"send_bits_per_second,omitempty"`
}

// NetworkMode is a way to connect a guest.
type NetworkMode string

// The ways to connect a guest. NetworkTAP and NetworkBridge take root or CAP_NET_ADMIN.
const (
	// NetworkUser connects the guest by a user-space TCP/IP stack in the VM's
	// shim. It needs no privilege.
	NetworkUser NetworkMode = "user"
	// NetworkTAP connects the guest by a TAP interface of the host, which routes for it.
	NetworkTAP NetworkMode = "tap"
	// NetworkBridge connects the guest to a bridge of the host, whose network gives it its
	// addresses. They are not known here, so no port of the host is forwarded.
	NetworkBridge NetworkMode = "bridge"
	// NetworkNone gives the guest no network interface but its own loopback.
	NetworkNone NetworkMode = "none"
)

// Bounds of the rates of a [Network], in bits a second.
const (
	MinNetworkRate = 8000
	MaxNetworkRate = 1 << 40
)

// maxInterfaceName is how many bytes Linux takes for the name of an interface.
const maxInterfaceName = 15

// Forwards reports whether ports of the host can be forwarded to guests in the mode.
func (m NetworkMode) Forwards() bool { return m != NetworkBridge && m != NetworkNone }

// validateNetwork checks how the VM is to be connected.
func (c VMConfig) validateNetwork(v *validator) {
	n := c.Network
	switch n.Mode {
	case NetworkUser, NetworkTAP, NetworkBridge, NetworkNone:
	default:
		v.add("network.mode", "%q is not known; use %s, %s, %s or %s", n.Mode, NetworkUser, NetworkTAP, NetworkBridge, NetworkNone)
		return
	}
	if n.Mode == NetworkBridge {
		v.check(isInterface(n.Bridge), "network.bridge", "%q is no name of a bridge, which has at most %d letters, digits, and characters of \".-_\"", n.Bridge, maxInterfaceName)
	} else {
		v.check(n.Bridge == "", "network.bridge", "is for network mode %s only", NetworkBridge)
	}
	v.check(!n.Pool.IsValid() || n.Mode == NetworkTAP, "network.pool", "is for network mode %s only", NetworkTAP)
	v.check(!n.OpenToVMs || n.Mode == NetworkTAP || n.Mode == NetworkBridge, "network.open_to_vms",
		"is for network modes %s and %s: in mode %s no guest reaches another", NetworkTAP, NetworkBridge, n.Mode)
	for _, rate := range []struct {
		field string
		bits  int64
	}{{"network.receive_bits_per_second", n.ReceiveBitsPerSecond}, {"network.send_bits_per_second", n.SendBitsPerSecond}} {
		v.check(rate.bits == 0 || rate.bits >= MinNetworkRate && rate.bits <= MaxNetworkRate, rate.field,
			"%d is out of range; use %d to %d, or 0 for no limit", rate.bits, MinNetworkRate, int64(MaxNetworkRate))
		v.check(rate.bits == 0 || n.Mode != NetworkNone, rate.field, "there is nothing to limit in network mode %s", n.Mode)
	}
	if n.Mode.Forwards() {
		return
	}
	why := "the guest has no network"
	if n.Mode == NetworkBridge {
		why = "the guest's address is not known; connect to it by the bridge's network"
	}
	v.check(len(c.PortForwards) == 0, "port_forwards", "no port can be forwarded in network mode %s: %s", n.Mode, why)
	v.check(!c.SSHHostAddr.IsValid(), "ssh_host_addr", "SSH is not offered on the host in network mode %s: %s", n.Mode, why)
	v.check(c.Ready != ReadySSH, "ready", "ssh can't be waited for in network mode %s: %s", n.Mode, why)
}

// isInterface reports whether a name can be that of a network interface.
func isInterface(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= maxInterfaceName &&
		strings.Trim(name, letters+digits+"._-") == ""
}

// String returns the network in words, as in "bridge br0".
func (n Network) String() string {
	if n.Mode == NetworkBridge {
		return fmt.Sprintf("%s %s", n.Mode, n.Bridge)
	}
	return string(n.Mode)
}

// NetworkConfig is a VM's network: its lease, and what follows from it.
type NetworkConfig struct {
	// Mode is how the guest is connected.
	Mode NetworkMode `json:"mode"`
	// GuestIP is the guest's address; Gateway is the host's side of its network
	// and Prefix that network. In [NetworkUser] every VM has a network of its
	// own, so all of them have the same addresses. In [NetworkBridge] they are not known.
	GuestIP netip.Addr   `json:"guest_ip,omitzero"`
	Gateway netip.Addr   `json:"gateway,omitzero"`
	Prefix  netip.Prefix `json:"prefix,omitzero"`
	// GuestIP6 and Gateway6 are the same of IPv6; not valid: there is none. A host without a
	// way out by IPv6, or in [NetworkTAP] one that forwards none, leaves the guest without.
	GuestIP6 netip.Addr `json:"guest_ip6,omitzero"`
	Gateway6 netip.Addr `json:"gateway6,omitzero"`
	// GuestMAC is the hardware address of the guest's interface.
	GuestMAC string `json:"guest_mac,omitempty"`
	// TAP is the interface of the host that leads to the guest, in [NetworkTAP] and
	// [NetworkBridge], and Bridge the bridge that it is a port of.
	TAP    string `json:"tap,omitempty"`
	Bridge string `json:"bridge,omitempty"`
	// SSHHostAddr and SSHHostPort forward to the guest's port 22 while the VM
	// runs. Not valid and 0: there is no such forward in the mode.
	SSHHostAddr netip.Addr `json:"ssh_host_addr,omitzero"`
	SSHHostPort int        `json:"ssh_host_port,omitempty"`
	// PortForwards are the forwards in force, or that a start will set up.
	PortForwards []PortForward `json:"port_forwards,omitempty"`
}
