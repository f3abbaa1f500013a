package network

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"

	"github.com/smolvm/smolvm"
)

// Config describes the network of one VM, however it is connected. It is plain data, which
// travels in a shim's orders.
type Config struct {
	// Mode is how the guest is connected. Empty: [smolvm.NetworkUser].
	Mode smolvm.NetworkMode `json:"mode,omitempty"`
	// Prefix is the network; Gateway is the host's side of it, where DNS also
	// answers; Guest is the guest's address, which DHCP gives to GuestMAC.
	Prefix   netip.Prefix `json:"prefix"`
	Gateway  netip.Addr   `json:"gateway"`
	Guest    netip.Addr   `json:"guest"`
	GuestMAC string       `json:"guest_mac"`
	// Metadata are the metadata services of clouds that the guest may reach. All others are
	// closed to it.
	Metadata []netip.Addr `json:"metadata,omitempty"`
	// Egress is what the guest may reach. Nil: all that is not closed always. A shim from
	// before there was this field would let everything out; see shim.OrderProtocol.
	Egress *Egress `json:"egress,omitempty"`
	// MTU of the guest's interface, in bytes. Zero: 1500.
	MTU int `json:"mtu,omitempty"`
	// Prefix6, Gateway6 and Guest6 are the addresses of IPv6; not valid: there are none.
	Prefix6  netip.Prefix `json:"prefix6,omitzero"`
	Gateway6 netip.Addr   `json:"gateway6,omitzero"`
	Guest6   netip.Addr   `json:"guest6,omitzero"`
	// TAP is the name of the interface that the modes [TAP] and [Bridge] make.
	TAP string `json:"tap,omitempty"`
	// Bridge is the name of the bridge in the mode [Bridge].
	Bridge string `json:"bridge,omitempty"`
	// OpenToVMs lets the guest reach other guests of the same mode that are open too, and
	// them reach it.
	OpenToVMs bool `json:"open_to_vms,omitempty"`
	// Rate bounds what passes.
	Rate Rate `json:"rate,omitzero"`
}

// Rate is how much may pass, in bits a second. Zero: as much as can.
type Rate struct {
	// ToGuest bounds what the guest receives, and FromGuest what it sends.
	ToGuest   uint64 `json:"to_guest,omitempty"`
	FromGuest uint64 `json:"from_guest,omitempty"`
}

// UsedMode returns the mode that a configuration stands for; nil stands for no network, and
// has none.
func (c *Config) UsedMode() smolvm.NetworkMode {
	if c == nil {
		return ""
	}
	return cmp.Or(c.Mode, smolvm.NetworkUser)
}

// ErrRefused matches the error of a connection to a port of the guest on which nothing
// listens at the guest's network address.
var ErrRefused = errors.New("connection was refused")

// Attachment is the network of one VM while the VM runs: what the shim's process needs of it,
// whichever way the guest is connected. Each mode has a package that makes one of a [Config].
// All methods may be called at the same time as others.
type Attachment interface {
	// Link is what the VMM attaches the guest's interface to.
	Link() Link
	// SetGuestMAC makes the network that of a guest with another hardware address.
	SetGuestMAC(mac string) error
	// DialGuest connects to a TCP port of the guest's address. The error matches
	// [ErrRefused] if nothing listens there.
	DialGuest(ctx context.Context, port int) (net.Conn, error)
	// Forward connects each connection of a listener to a TCP port of the guest. Closing
	// what it returns closes the listener and its connections; so does closing the network.
	Forward(listener net.Listener, guestPort int) io.Closer
	// ForwardPackets takes the datagrams that come to a socket to a UDP port of the guest,
	// and the answers back, until what it returns, or the network, is closed.
	ForwardPackets(conn *net.UDPConn, guestPort int) io.Closer
	// Search returns the domains that the host's own resolver searches at the moment.
	Search() []string
	// Close ends all of it, and returns when nothing of it runs any more. It may be called
	// again.
	Close() error
}

// Claimer is a network of a guest that stood by, which can become that of a VM. One that is not
// is made that of another guest by [Attachment].SetGuestMAC.
type Claimer interface {
	// Claim makes it the network of a VM, as the configuration says. If it fails nothing of the
	// network is left.
	Claim(ctx context.Context, config Config, vm string) error
}

// Meter is a network that counts what passes over the guest's interface.
type Meter interface {
	// Usage returns what has passed since the network was made.
	Usage() (smolvm.NetworkUsage, error)
}

// Link is the host's end of a guest's interface. One of its fields is set.
type Link struct {
	// Socket is the VMM's end of a pair of datagram sockets, each datagram one Ethernet
	// frame. It belongs to the network.
	Socket *os.File
	// TAP is the name of an interface of the host.
	TAP string
}

// Egress is the egress policy of a VM at one time.
type Egress struct {
	// Revision is 1 for the first policy of a VM, and one more at each change.
	Revision int64  `json:"revision"`
	Policy   Policy `json:"policy"`
}

// EgressSetter is a network whose policy can be changed while the VM runs. One that is not
// can't have a policy.
type EgressSetter interface {
	// SetEgress puts a policy in force in place of the one that is. Flows that it does not
	// allow have ended when it returns. A revision that is older than the one in force is an
	// error.
	SetEgress(Egress) error
	// EgressRevision returns the revision of the policy in force; 0: the VM was given none.
	EgressRevision() int64
}
