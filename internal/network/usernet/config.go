// Package usernet connects one VM by a user-space TCP/IP stack, without privilege.
package usernet

import "net/netip"

// Config describes the network of one VM. It is plain data.
type Config struct {
	// Prefix is the network; Gateway is the host's side of it, where DNS also
	// answers; Guest is the guest's address, which DHCP gives to GuestMAC.
	Prefix   netip.Prefix `json:"prefix"`
	Gateway  netip.Addr   `json:"gateway"`
	Guest    netip.Addr   `json:"guest"`
	GuestMAC string       `json:"guest_mac"`
	// Metadata are the metadata services of clouds that the guest may reach. All others are
	// closed to it.
	Metadata []netip.Addr `json:"metadata,omitempty"`
	// MTU of the guest's interface, in bytes. Zero: 1500.
	MTU int `json:"mtu,omitempty"`
}
