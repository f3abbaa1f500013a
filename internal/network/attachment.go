package network

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"

	"github.com/smolvm/smolvm"
)

// Config describes the network of one VM, however it is connected. It is plain data.
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

// ConfigOf returns the configuration of a network that was planned.
func ConfigOf(plan smolvm.NetworkConfig) Config {
	return Config{Prefix: plan.Prefix, Gateway: plan.Gateway, Guest: plan.GuestIP, GuestMAC: plan.GuestMAC}
}

// ErrRefused matches the error of a connection to a port of the guest on which nothing
// listens at the guest's network address.
var ErrRefused = errors.New("connection was refused")

// Attachment is the network of one VM while the VM runs: what package session needs of it,
// whichever way the guest is connected.
type Attachment interface {
	// Link is what the VMM attaches the guest's interface to.
	Link() Link
	// SetGuestMAC makes the network that of a guest with another hardware address.
	SetGuestMAC(mac string) error
	// DialGuest connects to a TCP port of the guest's address. The error matches
	// [ErrRefused] if nothing listens there.
	DialGuest(ctx context.Context, port int) (net.Conn, error)
	// Forward connects each connection of a listener to one that dial makes. Closing what
	// it returns closes the listener and its connections; so does closing the network.
	Forward(listener net.Listener, dial func(context.Context) (net.Conn, error)) io.Closer
	// ForwardPackets takes the datagrams that come to a socket to a UDP port of the guest,
	// and the answers back, until what it returns, or the network, is closed.
	ForwardPackets(conn *net.UDPConn, guestPort int) io.Closer
	// Search returns the domains that the host's own resolver searches at the moment.
	Search() []string
	// Problem returns what the network can't do on this host; nil if there is nothing.
	Problem() error
	// Close ends all of it, and returns when nothing of it runs any more.
	Close() error
}

// Link is the host's end of a guest's interface. One of its fields is set.
type Link struct {
	// Socket is the VMM's end of a pair of datagram sockets, each datagram one Ethernet
	// frame. It belongs to the network.
	Socket *os.File
	// TAP is the name of an interface of the host.
	TAP string
}
