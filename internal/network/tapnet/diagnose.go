package tapnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// Obstacle is what stops the packets of guests on their way.
type Obstacle struct {
	// What was sent, for a person.
	What string
	// Problem says what has stopped it, and Fix what to do: a command, or empty.
	Problem, Fix string
}

const (
	// doctorTable is the table, of family inet, that follows the packets of a diagnosis.
	doctorTable = "smolvm-doctor"
	// silence is how long nothing must be said of a packet before it is taken to be lost.
	silence = 2 * time.Second
	// testPort is a port that nobody uses: that of the protocol discard.
	testPort = 9
)

// testAddr is an address that nobody has (TEST-NET-1, RFC 5737).
func testAddr() netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, 1}) }

// Diagnose makes the network of a guest, sends packets as the guest would, through all firewalls of
// the host, and returns what stops them. It removes what it has made. Nothing leaves the host: a
// packet that has passed all is taken away. An error says that it could not find out; one that
// matches [os.ErrPermission] that this takes more privileges.
func Diagnose(ctx context.Context, config network.Config, owner Owner) (_ []Obstacle, err error) {
	n, err := New(ctx, config, owner)
	if errors.Is(err, ErrPoolCollides) {
		return []Obstacle{{What: "packets to guests", Problem: err.Error(), Fix: smolvm.HintOf(err)}}, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	return n.obstacles(ctx)
}

// obstacles returns what stops the packets of the guest.
func (n *Network) obstacles(ctx context.Context) (_ []Obstacle, err error) {
	guest, err := openTAP(n.config.TAP)
	if err != nil {
		return nil, err
	}
	defer func() { _ = guest.Close() }()
	link, err := netlink.LinkByName(n.config.TAP)
	if err != nil {
		return nil, fmt.Errorf("look at interface %s: %w", n.config.TAP, err)
	}
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	addDoctorTable(conn, n.config.TAP)
	if err := conn.Flush(); err != nil {
		return nil, fmt.Errorf("follow packets by nftables: %w", err)
	}
	defer func() {
		conn.DelTable(&nftables.Table{Name: doctorTable, Family: nftables.TableFamilyINet})
		err = errors.Join(err, conn.Flush())
	}()
	var found []Obstacle
	for _, probe := range []struct {
		what string
		to   netip.AddrPort
		way  func(*Network) *Obstacle
	}{
		{"packets of guests to the outside", netip.AddrPortFrom(testAddr(), testPort), (*Network).lostOutside},
		{"questions of guests for names", netip.AddrPortFrom(n.config.Gateway, dnsPort), (*Network).lostInside},
	} {
		frame := udpFrame(link.Attrs().HardwareAddr, n.config.GuestMAC, netip.AddrPortFrom(n.config.Guest, testPort), probe.to)
		obstacle, err := n.follow(ctx, conn, guest, frame)
		if err != nil {
			return found, err
		}
		if obstacle != nil && obstacle.Problem == "" {
			obstacle = probe.way(n)
		}
		if obstacle != nil {
			obstacle.What = probe.what
			found = append(found, *obstacle)
		}
	}
	return found, nil
}

// follow sends a packet as the guest, and returns what has stopped it: without a problem, if no
// firewall has; nil, if nothing has.
func (n *Network) follow(ctx context.Context, conn *nftables.Conn, guest *os.File, frame []byte) (*Obstacle, error) {
	trace, err := newTracer()
	if err != nil {
		return nil, err
	}
	defer trace.close()
	if _, err := guest.Write(frame); err != nil {
		return nil, fmt.Errorf("send as the guest of %s: %w", n.config.TAP, err)
	}
	steps, err := trace.steps(ctx, silence)
	switch {
	case err != nil:
		return nil, err
	case len(steps) == 0 || !steps[len(steps)-1].dropped:
		return &Obstacle{}, nil
	}
	last := steps[len(steps)-1]
	if last.table == doctorTable {
		return nil, nil // it has passed all
	}
	return describeDrop(conn, last), nil
}

// addDoctorTable adds to a transaction the rules that follow the packets of an interface, and take
// away those that have passed all others.
func addDoctorTable(conn *nftables.Conn, tap string) {
	t := conn.AddTable(&nftables.Table{Name: doctorTable, Family: nftables.TableFamilyINet})
	chain := func(name string, hook *nftables.ChainHook, priority int32) *nftables.Chain {
		return conn.AddChain(&nftables.Chain{
			Name: name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)),
		})
	}
	add := func(c *nftables.Chain, parts ...match) {
		conn.AddRule(&nftables.Rule{Table: t, Chain: c, Exprs: rule(parts...)})
	}
	const before, after = -450, 450 // all others
	is := func(key expr.MetaKey) match { return match{load(key), compare(expr.CmpOpEq, ifname(tap))} }
	add(chain("follow", nftables.ChainHookPrerouting, before), is(expr.MetaKeyIIFNAME), match{
		&expr.Immediate{Register: first, Data: []byte{1}},
		&expr.Meta{Key: expr.MetaKeyNFTRACE, SourceRegister: true, Register: first},
	})
	to := testAddr().As4()
	add(chain("outside", nftables.ChainHookPostrouting, after), ipv4().is(), match{
		ipv4().payload(ipv4().to, first), compare(expr.CmpOpEq, to[:]),
		&expr.Payload{DestRegister: first, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		compare(expr.CmpOpEq, binaryutil.BigEndian.PutUint16(testPort)),
	}, drop())
	add(chain("inside", nftables.ChainHookInput, after), is(expr.MetaKeyIIFNAME), drop())
}

// describeDrop says which rule has dropped a packet.
func describeDrop(conn *nftables.Conn, s step) *Obstacle {
	family := familyName(s.family)
	o := &Obstacle{Fix: fmt.Sprintf("nft -a list chain %s %s %s", family, s.table, s.chain)}
	chain := fmt.Sprintf("chain %s of table %s %s%s", s.chain, family, s.table, whose(conn, s))
	if s.rule == 0 {
		o.Problem = fmt.Sprintf("dropped by the policy of %s, as no rule lets them pass", chain)
		return o
	}
	o.Problem = fmt.Sprintf("dropped by the rule with handle %d in %s", s.rule, chain)
	t := &nftables.Table{Name: s.table, Family: s.family}
	rules, err := conn.GetRules(t, &nftables.Chain{Name: s.chain, Table: t})
	if err != nil {
		return o // it is gone meanwhile
	}
	for _, r := range rules {
		if comment, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok && r.Handle == s.rule {
			o.Problem += fmt.Sprintf(" (%q)", comment)
		}
	}
	return o
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyINet:
		return "inet"
	case nftables.TableFamilyBridge:
		return "bridge"
	default:
		return fmt.Sprintf("family %d", f)
	}
}

// whose says to whom a table seems to belong; empty: that is not known.
func whose(conn *nftables.Conn, s step) string {
	switch s.table {
	case tableName:
		return ", smolvm's own"
	case "firewalld":
		return ", which is firewalld's"
	}
	chains, err := conn.ListChainsOfTableFamily(s.family)
	if err != nil {
		return ""
	}
	for _, c := range chains {
		switch {
		case c.Table.Name != s.table:
		case strings.HasPrefix(c.Name, "ufw"):
			return ", which ufw has rules in"
		case strings.HasPrefix(c.Name, "DOCKER"):
			return ", which Docker has rules in"
		}
	}
	return ""
}

// lostOutside returns why the kernel may have lost a packet to the outside, which no firewall has
// dropped.
func (n *Network) lostOutside() *Obstacle {
	tap, to := n.config.TAP, testAddr()
	for _, name := range []string{"ipv4/ip_forward", "ipv4/conf/" + tap + "/forwarding"} {
		if value, err := sysctl(name); err == nil && value == "0" {
			return &Obstacle{
				Problem: fmt.Sprintf("the host does not forward them: %s is 0", dotted(name)),
				Fix:     fmt.Sprintf("sysctl -w %s=1", dotted(name)),
			}
		}
	}
	if o := n.reversed(); o != nil {
		return o
	}
	if _, err := netlink.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{Iif: tap, SrcAddr: n.config.Guest.AsSlice()}); err != nil {
		return &Obstacle{Problem: fmt.Sprintf("the host has no route for them, as to %s: %v", to, err), Fix: "ip route add default via GATEWAY"}
	}
	return &Obstacle{Problem: "the kernel has lost them, and no rule of nftables has; it may be one of iptables-legacy", Fix: "iptables-legacy-save"}
}

// lostInside is lostOutside for a packet to the gateway.
func (n *Network) lostInside() *Obstacle {
	if o := n.reversed(); o != nil {
		return o
	}
	return &Obstacle{Problem: "the kernel has lost them, and no rule of nftables has; it may be one of iptables-legacy", Fix: "iptables-legacy-save"}
}

// reversed returns why the kernel's filter of reverse paths drops packets of the guest; nil: it does
// not.
func (n *Network) reversed() *Obstacle {
	strict := false
	for _, name := range []string{"all", n.config.TAP} {
		value, err := sysctl("ipv4/conf/" + name + "/rp_filter")
		strict = strict || err == nil && value == "1"
	}
	routes, err := netlink.RouteGet(n.config.Guest.AsSlice())
	if !strict || err != nil || len(routes) == 0 {
		return nil
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil || link.Attrs().Name == n.config.TAP {
		return nil
	}
	return &Obstacle{
		Problem: fmt.Sprintf("dropped by the reverse path filter (rp_filter): the host's route to the guest's address %s leads out by %s, and not by %s",
			n.config.Guest, link.Attrs().Name, n.config.TAP),
		Fix: "ip rule; ip route get " + n.config.Guest.String(),
	}
}

// dotted returns a sysctl's name as sysctl(8) has it.
func dotted(name string) string { return "net." + strings.ReplaceAll(name, "/", ".") }

// openTAP opens a TAP interface as the VMM does.
func openTAP(name string) (*os.File, error) {
	file, err := os.OpenFile("/dev/net/tun", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open TAP interface %s: %w", name, err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(int(file.Fd()), unix.TUNSETIFF, request)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open TAP interface %s: %w", name, err), file.Close())
	}
	return file, nil
}

// udpFrame returns an Ethernet frame with an empty datagram.
func udpFrame(to net.HardwareAddr, fromMAC string, from, dest netip.AddrPort) []byte {
	mac, err := net.ParseMAC(fromMAC)
	if err != nil {
		mac = make(net.HardwareAddr, macLength)
	}
	const ipHeader, udpHeader = 20, 8
	frame := append(append(append([]byte{}, to...), mac...), 0x08, 0x00)
	header := []byte{0x45, 0, 0, ipHeader + udpHeader, 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	header = append(append(header, from.Addr().AsSlice()...), dest.Addr().AsSlice()...)
	binary.BigEndian.PutUint16(header[10:], checksum(header))
	datagram := binary.BigEndian.AppendUint16(nil, from.Port())
	datagram = binary.BigEndian.AppendUint16(datagram, dest.Port())
	datagram = append(datagram, 0, udpHeader, 0, 0) // without a checksum
	return append(append(frame, header...), datagram...)
}
