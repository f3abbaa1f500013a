package smolvm

import "net/netip"

// NetworkConfig is a VM's network: its lease, and what follows from it.
type NetworkConfig struct {
	// Mode is how the guest is connected.
	Mode NetworkMode `json:"mode"`
	// GuestIP is the guest's address; Gateway is the host's side of its network
	// and Prefix that network. In [NetworkUser] every VM has a network of its
	// own, so all of them have the same addresses.
	GuestIP netip.Addr   `json:"guest_ip"`
	Gateway netip.Addr   `json:"gateway"`
	Prefix  netip.Prefix `json:"prefix"`
	// GuestMAC is the hardware address of the guest's interface.
	GuestMAC string `json:"guest_mac"`
	// SSHHostAddr and SSHHostPort forward to the guest's port 22 while the VM
	// runs.
	SSHHostAddr netip.Addr `json:"ssh_host_addr"`
	SSHHostPort int        `json:"ssh_host_port,omitempty"`
	// PortForwards are the forwards in force, or that a start will set up.
	PortForwards []PortForward `json:"port_forwards,omitempty"`
}

// NetworkMode is a way to connect a guest.
type NetworkMode string

// NetworkUser connects the guest by a user-space TCP/IP stack in the VM's
// shim. It needs no privilege.
const NetworkUser NetworkMode = "user"
