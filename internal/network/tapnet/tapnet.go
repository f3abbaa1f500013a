// Package tapnet connects VMs by TAP interfaces of the host, which takes root or
// CAP_NET_ADMIN. Each VM has an interface, and the host a route to the VM's addresses alone by
// it; the host's kernel carries the packets. What guests may reach is said by one table of
// nftables, of family inet, in which each VM has elements of sets. Of a guest with an egress policy
// the kernel gives all flows to sockets of this process, whatever address they are to, and package
// outbound carries them.
//
// Everything says on the host itself whose it is (see [Owner]), so what a process that was
// killed has left is found without any other record ([Reconcile]).
//
// Ports of the host are forwarded by sockets of this process, not by rules that change
// destinations (DNAT). A port is then taken as any other is, and no program that listens on it
// loses its connections unawares; 127.0.0.1 works without route_localnet, which would let
// neighbors on the host's links reach what listens on loopback; and nothing of a forward stays
// when its process ends. The guest sees the host as the peer, and the bytes pass through
// the kernel's pipes (splice) instead of its forwarding.
package tapnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/google/nftables"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/outbound"
	"github.com/smolvm/smolvm/internal/network/resolver"
	"github.com/smolvm/smolvm/internal/stream"
)

var _ network.Attachment = (*Network)(nil)

// Network is the network of one VM on a TAP interface.
type Network struct {
	config   network.Config
	owner    Owner
	problem  error
	files    resolver.Files
	sessions stream.Sessions // of UDP forwards
	names    *resolver.Resolver
	records  network.LateRecorder
	servers  []*dns.Server                     // of names; none if the guest has no name server
	running  sync.WaitGroup                    // they
	open     stream.Open                       // forwards and connections
	out      atomic.Pointer[outbound.Outbound] // of the flows that this process carries

	changing sync.Mutex // held while something of it changes on the host; guards the following, and the MAC
	has      offers     // as the host has it
	carrier  *carrier   // nil: the guest has had no policy yet
	watcher  *watcher   // nil: what the kernel carries is not recorded
	ended    bool       // it carries no flows any more
	removed  bool       // nothing is left on the host
}

// New makes the network of a VM, in the mode [network.TAP] or [network.Bridge]. What another
// process of the same VM, or a dead owner, has left in its place is replaced. If it fails,
// nothing stays but what the error says.
func New(ctx context.Context, config network.Config, owner Owner) (*Network, error) {
	return newWith(ctx, config, owner, resolver.HostFiles())
}

func newWith(ctx context.Context, config network.Config, owner Owner, files resolver.Files) (*Network, error) {
	n := &Network{config: config, owner: owner, sessions: stream.Sessions{Limit: maxSessions}}
	if err := n.check(); err != nil {
		return nil, fmt.Errorf("make the network of VM %s: %w", owner.VM, err)
	}
	unlock, err := lock(ctx)
	if err != nil {
		return nil, fmt.Errorf("make the network of VM %s: %w", owner.VM, err)
	}
	defer unlock()
	if err := n.make(files, n.claim); err != nil {
		err = errors.Join(err, n.undo())
		return nil, fmt.Errorf("make the network of VM %s: %w", owner.VM, withHint(err))
	}
	return n, nil
}

// withHint adds what to do about a lack of privileges.
func withHint(err error) error {
	if errors.Is(err, os.ErrPermission) && smolvm.HintOf(err) == "" {
		return &smolvm.Error{Hint: "run as root or with CAP_NET_ADMIN, or use network mode user", Err: err}
	}
	return err
}

// check returns why the network can't be made, as far as its configuration says.
func (n *Network) check() error {
	c := n.config
	if c.Mode == network.Bridge && c.Egress != nil {
		return errNoPolicies()
	}
	if err := n.owner.check(); err != nil {
		return err
	}
	if err := checkRate(c.Rate); err != nil {
		return err
	}
	if !strings.HasPrefix(c.TAP, network.TAPPrefix) || len(c.TAP) >= unix.IFNAMSIZ || strings.ContainsAny(c.TAP, "/. ") {
		return fmt.Errorf("%q is no name for the interface of a guest", c.TAP)
	}
	switch {
	case c.Mode == network.Bridge, c.IsStandby():
		return nil
	case c.Mode == network.TAP:
	default:
		return fmt.Errorf("%w: mode %q is none with a TAP interface", smolvm.ErrUnsupported, c.Mode)
	}
	if err := network.CheckPool(c.Prefix); err != nil {
		return err
	}
	for _, addr := range []netip.Addr{c.Guest, c.Gateway} {
		if !c.Prefix.Contains(addr) {
			return fmt.Errorf("address %s is not in the pool %s", addr, c.Prefix)
		}
	}
	for _, addr := range []netip.Addr{c.Guest6, c.Gateway6} {
		if c.Prefix6.IsValid() && !c.Prefix6.Contains(addr) {
			return fmt.Errorf("address %s is not in %s", addr, c.Prefix6)
		}
	}
	return nil
}

// claim makes the interface of the guest, and returns its index.
func (n *Network) claim(handle *netlink.Handle) (index int, err error) {
	return claimTAP(handle, n.config.TAP, n.owner)
}

// make makes all of the network on the host, with the interface that claim returns.
func (n *Network) make(files resolver.Files, claim func(*netlink.Handle) (int, error)) error {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer handle.Close()
	if n.config.Mode == network.Bridge {
		if _, err := findBridge(handle, n.config.Bridge); err != nil {
			return err
		}
	}
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	if n.config.Mode == network.TAP && !n.config.IsStandby() {
		if err := n.prepare(handle, conn); err != nil {
			return err
		}
	}
	n.newOutbound()
	n.files, n.names = files, n.newResolver(files)
	if n.config.IsStandby() {
		_, err := claim(handle)
		return err
	}
	index, err := claim(handle)
	if err != nil {
		return err
	}
	link, err := handle.LinkByIndex(index)
	if err != nil {
		return fmt.Errorf("look at interface %s: %w", n.config.TAP, err)
	}
	if n.config.Mode == network.TAP {
		err := n.serveNames()
		n.problem = errors.Join(n.problem, err)
		n.has.names = err == nil
	}
	if n.config.Mode == network.TAP {
		n.watcher, err = watch(n.config, n.out.Load(), &n.records)
		n.problem = errors.Join(n.problem, err)
	}
	if n.config.Egress != nil && !isOpen(n.config.Egress.Policy) {
		if err := n.carry(handle); err != nil {
			return err
		}
		n.has.restricted, n.has.carrier = true, n.carrier.port
	}
	if err := n.admit(conn); err != nil {
		return changeError(err, n.has)
	}
	if err := shape(handle, link, n.config.Rate.ToGuest); err != nil {
		return err
	}
	if n.config.Mode == network.Bridge {
		return join(handle, link, n.config)
	}
	return routeTo(handle, link, n.config)
}

// prepare sees to it that the host can route for the VM.
func (n *Network) prepare(handle *netlink.Handle, conn *nftables.Conn) error {
	if err := forwardIPv4(); err != nil {
		return err
	}
	if n.problem = forwardIPv6(); n.problem != nil {
		n.config.Guest6, n.config.Gateway6, n.config.Prefix6 = netip.Addr{}, netip.Addr{}, netip.Prefix{}
	}
	known, err := look(conn)
	if err != nil {
		return err
	}
	if known.hasTable() {
		// The pool was compared with all routes when its first VM came.
		has, err := hasPool(conn, n.config.Prefix)
		if err != nil {
			return err
		}
		if has {
			return checkAddress(handle, n.config.Prefix, n.config.Guest, n.config.TAP)
		}
	}
	return checkPool(n.config.Prefix, n.owner.Directory)
}

// admit writes down in nftables what the guest may do: the table, if it is not there, the
// VM's elements, and what others' chains lack, in one transaction.
func (n *Network) admit(conn *nftables.Conn) error {
	known, err := look(conn)
	if err != nil {
		return err
	}
	hasPoolAlready := n.config.Mode == network.Bridge
	if known.hasTable() && !hasPoolAlready {
		if hasPoolAlready, err = hasPool(conn, n.config.Prefix); err != nil {
			return err
		}
	}
	if err := known.ensureTable(conn); err != nil {
		return err
	}
	if !hasPoolAlready {
		if err := addPool(conn, n.config); err != nil {
			return err
		}
	}
	if err := known.dropStale(conn, n.config); err != nil {
		return err
	}
	if err := addPort(conn, n.config); err != nil {
		return err
	}
	if n.config.Mode == network.TAP {
		passages, err := known.passages(conn)
		if err != nil {
			return err
		}
		if err := openPassages(conn, passages); err != nil {
			return err
		}
		if n.has.restricted {
			known.ensureCarrying(conn)
		}
		if err := addElements(conn, elementsOf(n.config, n.owner, n.has)); err != nil {
			return err
		}
	}
	return conn.Flush()
}

// Problem returns what the network can't do on this host; nil if there is nothing. All else
// works.
func (n *Network) Problem() error { return n.problem }

// Config returns the network as it was made: without IPv6 if the host has none for guests.
func (n *Network) Config() network.Config { return n.config }

// Link implements [network.Attachment].
func (n *Network) Link() network.Link { return network.Link{TAP: n.config.TAP} }

// SetGuestMAC implements [network.Attachment]. The host forgets which hardware address the
// guest had.
func (n *Network) SetGuestMAC(mac string) error {
	parsed, err := net.ParseMAC(mac)
	if err != nil || len(parsed) != macLength {
		return fmt.Errorf("MAC address %q of the guest is not valid", mac)
	}
	n.changing.Lock()
	defer n.changing.Unlock()
	unlock, err := lockSoon()
	if err != nil {
		return fmt.Errorf("change the hardware address of the guest: %w", err)
	}
	defer unlock()
	n.config.GuestMAC = mac
	if n.config.Mode == network.Bridge {
		conn, err := nftables.New()
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		if err := addPort(conn, n.config); err != nil {
			return err
		}
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("let the guest of %s send with the address %s: %w", n.config.TAP, mac, err)
		}
		return nil
	}
	link, err := netlink.LinkByName(n.config.TAP)
	if err != nil {
		return fmt.Errorf("look at interface %s: %w", n.config.TAP, err)
	}
	for _, addr := range []netip.Addr{n.config.Guest, n.config.Guest6} {
		if !addr.IsValid() {
			continue
		}
		err := netlink.NeighDel(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: addr.AsSlice()})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("forget the hardware address of %s: %w", addr, err)
		}
	}
	return nil
}

// DialGuest implements [network.Attachment]. It connects by the guest's interface, whatever
// the host's routes say. In the mode bridge the guest's address is not known here.
func (n *Network) DialGuest(ctx context.Context, port int) (net.Conn, error) {
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("connect to port %d of the guest: ports are 1 to 65535", port)
	}
	conn, err := n.dial(ctx, "tcp4", port)
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("connect to port %d of the guest: %w", port, network.ErrRefused)
	case err != nil:
		return nil, fmt.Errorf("connect to port %d of the guest: %w", port, err)
	}
	c := &guestConn{Conn: conn, network: n}
	if !n.open.Add(c) {
		_ = c.Close()
		return nil, fmt.Errorf("connect to port %d of the guest: %w", port, net.ErrClosed)
	}
	return c, nil
}

func (n *Network) dial(ctx context.Context, protocol string, port int) (net.Conn, error) {
	if n.config.Mode == network.Bridge {
		return nil, &smolvm.Error{
			Hint: "connect to the address that the bridge's network has given the guest",
			Err:  fmt.Errorf("%w in network mode %s", smolvm.ErrUnsupported, network.Bridge),
		}
	}
	dialer := net.Dialer{
		LocalAddr: localAddr(protocol, n.config.Gateway),
		Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			controlErr := raw.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), n.config.TAP) })
			return errors.Join(controlErr, err)
		},
	}
	return dialer.DialContext(ctx, protocol, net.JoinHostPort(n.config.Guest.String(), strconv.Itoa(port)))
}

func localAddr(protocol string, addr netip.Addr) net.Addr {
	if protocol == "udp4" {
		return net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0))
	}
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0))
}

// guestConn is a connection to the guest, which ends with the network.
type guestConn struct {
	net.Conn
	network *Network
}

// Close implements [net.Conn].
func (c *guestConn) Close() error {
	c.network.open.Remove(c)
	return c.Conn.Close()
}

// CloseWrite ends what is sent to the guest.
func (c *guestConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Conn.Close()
}

// Search implements [network.Attachment].
func (n *Network) Search() []string { return n.names.Search() }
