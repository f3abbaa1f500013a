package guest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The client of DHCP (RFC 2131) asks by packets of its own, as it must before the interface has
// an address, and hears what comes to the interface by any address.

const (
	// dhcpFirstTimeout is how long an answer is waited for the first time, and dhcpTimeout at most.
	dhcpFirstTimeout, dhcpTimeout = time.Second, 8 * time.Second
	// dhcpPatience is how long commands wait for the network to be set up.
	dhcpPatience = 10 * time.Second
	// minLease and maxLease bound what is believed of a lease's duration.
	minLease, maxLease = 30 * time.Second, 30 * 24 * time.Hour
	// maxServers bounds the name servers that are taken from an answer.
	maxServers = 3
)

// Types of messages, and options.
const (
	dhcpDiscover, dhcpOffer, dhcpRequest, dhcpAck, dhcpNak = 1, 2, 3, 5, 6

	optMask, optRouter, optDNS, optHostname, optDomain, optMTU = 1, 3, 6, 12, 15, 26
	optAddress, optLease, optType, optServer, optWanted        = 50, 51, 53, 54, 55
	optEnd                                                     = 255
)

// dhcpLease is what a server has given.
type dhcpLease struct {
	address  netip.Prefix
	router   netip.Addr // not valid: none
	servers  []netip.Addr
	domain   string
	mtu      int // 0: not told
	server   netip.Addr
	duration time.Duration
}

// dhcpClient keeps the lease of an interface.
type dhcpClient struct {
	name   string
	mac    net.HardwareAddr
	cancel context.CancelFunc
	done   chan struct{}
	leased chan struct{} // closed when there is a lease for the first time
}

// askDHCP has an interface that is up get its addresses, and keep them.
func askDHCP(fd int, name, mac string) (*dhcpClient, error) {
	address, err := net.ParseMAC(mac)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &dhcpClient{name: name, mac: address, cancel: cancel, done: make(chan struct{}), leased: make(chan struct{})}
	own, err := unix.Dup(fd)
	if err != nil {
		cancel()
		return nil, err
	}
	go c.run(ctx, own)
	return c, nil
}

// await returns when there is a lease, or nobody has answered for a while, or the client has
// ended; nil has nothing to wait for.
func (c *dhcpClient) await() {
	if c == nil {
		return
	}
	patience := time.NewTimer(dhcpPatience)
	defer patience.Stop()
	select {
	case <-c.leased:
	case <-c.done:
	case <-patience.C:
	}
}

// stop ends the client; nil has none.
func (c *dhcpClient) stop() {
	if c != nil {
		c.cancel()
		<-c.done
	}
}

// run gets a lease, and keeps it. fd is a socket to set up the interface by, which it closes.
func (c *dhcpClient) run(ctx context.Context, fd int) {
	defer close(c.done)
	defer func() { _ = unix.Close(fd) }()
	var last *dhcpLease
	var ends time.Time
	for first := true; ctx.Err() == nil; {
		lease, err := c.ask(ctx, last)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			if err := c.apply(fd, last, *lease); err != nil {
				fmt.Fprintln(os.Stderr, "smolvm-agent: DHCP:", err)
			}
			last, ends = lease, time.Now().Add(lease.duration)
			if first {
				close(c.leased)
				first = false
			}
			if !sleep(ctx, lease.duration/2) {
				return
			}
		case errors.Is(err, errNak), last != nil && time.Now().After(ends):
			_ = setAddress(fd, c.name, unix.SIOCSIFADDR, netip.IPv4Unspecified())
			last = nil
		case last != nil:
			if !sleep(ctx, max(time.Until(ends)/4, time.Second)) {
				return
			}
		default:
			sleep(ctx, dhcpFirstTimeout)
		}
	}
}

// sleep reports whether so much time has passed without an end of ctx.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// apply gives the interface what a lease says.
func (c *dhcpClient) apply(fd int, before *dhcpLease, lease dhcpLease) error {
	if before == nil || before.address != lease.address || before.router != lease.router {
		if err := setPrefix(fd, c.name, lease.address); err != nil {
			return fmt.Errorf("set address %s: %w", lease.address, err)
		}
		if err := addDefaultRoute(fd, lease.router); err != nil {
			return err
		}
	}
	if lease.mtu >= minMTU {
		if err := setMTU(fd, c.name, lease.mtu); err != nil {
			return fmt.Errorf("set MTU %d: %w", lease.mtu, err)
		}
	}
	if len(lease.servers) == 0 {
		return nil
	}
	var search []string
	if lease.domain != "" {
		search = []string{lease.domain}
	}
	return identityFiles{root: "/"}.put("etc/resolv.conf", resolvConf(lease.servers, search))
}

// minMTU is the least that a network of IPv4 has to carry.
const minMTU = 576

var errNak = errors.New("the address was refused")

// ask asks for a lease: the one that there is, to be kept for longer, or a new one.
func (c *dhcpClient) ask(ctx context.Context, last *dhcpLease) (*dhcpLease, error) {
	found, err := net.InterfaceByName(c.name)
	if err != nil {
		sleep(ctx, dhcpTimeout)
		return nil, err
	}
	socket, err := openPackets(found.Index)
	if err != nil {
		sleep(ctx, dhcpTimeout)
		return nil, err
	}
	defer func() { _ = unix.Close(socket) }()
	x := &exchange{client: c, socket: socket, index: found.Index}
	_, _ = rand.Read(x.id[:]) // never fails: crypto/rand ends the program instead
	if last != nil {
		return x.request(ctx, *last, true)
	}
	offer, err := x.until(ctx, dhcpDiscover, nil, dhcpOffer)
	if err != nil {
		return nil, err
	}
	return x.request(ctx, *offer, false)
}

// exchange is a series of messages with the same number.
type exchange struct {
	client *dhcpClient
	socket int
	index  int
	id     [4]byte
	ciaddr netip.Addr // set if the guest has the address already
}

func (x *exchange) request(ctx context.Context, lease dhcpLease, has bool) (*dhcpLease, error) {
	options := [][]byte{option(optAddress, lease.address.Addr().AsSlice()), option(optServer, lease.server.AsSlice())}
	if has {
		x.ciaddr, options = lease.address.Addr(), nil
	}
	return x.until(ctx, dhcpRequest, options, dhcpAck)
}

// until sends a message until there is an answer of a type, a few times.
func (x *exchange) until(ctx context.Context, kind byte, options [][]byte, want byte) (*dhcpLease, error) {
	packet := x.packet(kind, options)
	to := &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_IP), Ifindex: x.index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	for wait := dhcpFirstTimeout; wait <= dhcpTimeout && ctx.Err() == nil; wait *= 2 {
		if err := unix.Sendto(x.socket, packet, 0, to); err != nil && !errors.Is(err, unix.ENETDOWN) {
			return nil, err
		}
		for deadline := time.Now().Add(wait); ctx.Err() == nil && time.Now().Before(deadline); {
			got, lease := x.receive()
			switch {
			case got == dhcpNak && kind == dhcpRequest:
				return nil, errNak
			case got == want && lease != nil:
				return lease, nil
			}
		}
	}
	return nil, errors.New("nobody answers")
}

// receive returns what the next packet says, if it is an answer; it waits for a short time.
func (x *exchange) receive() (kind byte, lease *dhcpLease) {
	buffer := make([]byte, 2048)
	n, _, err := unix.Recvfrom(x.socket, buffer, 0)
	if err != nil {
		return 0, nil
	}
	message, ok := dhcpPayload(buffer[:n])
	if !ok {
		return 0, nil
	}
	return parseDHCP(message, x.id, x.client.mac)
}

func bigEndian(v uint16) uint16 { return v<<8 | v>>8 }

// openPackets opens a socket for the packets of IPv4 of an interface.
func openPackets(index int) (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(bigEndian(unix.ETH_P_IP)))
	if err != nil {
		return -1, fmt.Errorf("open a socket for packets: %w", err)
	}
	// Short, so that the end of the client is noticed.
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000})
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_IP), Ifindex: index})
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

const (
	dhcpFixed            = 236 // bytes before the options
	ipHeader, udpHeader  = 20, 8
	serverPort, ownPort  = 67, 68
	bootRequest, bootAck = 1, 2
)

var dhcpMagic = []byte{99, 130, 83, 99}

func option(code byte, value []byte) []byte {
	return append([]byte{code, byte(len(value))}, value...)
}

// packet returns a message as a packet of IPv4 to all.
func (x *exchange) packet(kind byte, options [][]byte) []byte {
	const broadcast = 0x8000
	m := make([]byte, dhcpFixed, 400)
	m[0], m[1], m[2] = bootRequest, 1, byte(len(x.client.mac))
	copy(m[4:], x.id[:])
	if x.ciaddr.IsValid() {
		copy(m[12:], x.ciaddr.AsSlice())
	} else {
		binary.BigEndian.PutUint16(m[10:], broadcast)
	}
	copy(m[28:], x.client.mac)
	m = append(m, dhcpMagic...)
	m = append(m, option(optType, []byte{kind})...)
	for _, o := range options {
		m = append(m, o...)
	}
	if name, err := os.Hostname(); err == nil && name != "" && len(name) <= 63 {
		m = append(m, option(optHostname, []byte(name))...)
	}
	m = append(m, option(optWanted, []byte{optMask, optRouter, optDNS, optDomain, optMTU, optLease})...)
	m = append(m, optEnd)

	source := netip.IPv4Unspecified()
	if x.ciaddr.IsValid() {
		source = x.ciaddr
	}
	p := make([]byte, ipHeader+udpHeader, ipHeader+udpHeader+len(m))
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(p[2:], uint16(cap(p)))
	copy(p[12:], source.AsSlice())
	copy(p[16:], []byte{255, 255, 255, 255})
	binary.BigEndian.PutUint16(p[10:], checksum(p[:ipHeader]))
	udp := p[ipHeader:]
	binary.BigEndian.PutUint16(udp, ownPort)
	binary.BigEndian.PutUint16(udp[2:], serverPort)
	binary.BigEndian.PutUint16(udp[4:], uint16(udpHeader+len(m)))
	return append(p, m...) // a checksum of UDP is optional in IPv4
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// dhcpPayload returns the message in a packet of IPv4, if it is one of a server.
func dhcpPayload(p []byte) ([]byte, bool) {
	if len(p) < ipHeader || p[0]>>4 != 4 || p[9] != unix.IPPROTO_UDP {
		return nil, false
	}
	const fragment = 0x3fff // an offset, or more fragments
	header := int(p[0]&0xf) * 4
	if header < ipHeader || len(p) < header+udpHeader || binary.BigEndian.Uint16(p[6:])&fragment != 0 {
		return nil, false
	}
	udp := p[header:]
	length := int(binary.BigEndian.Uint16(udp[4:]))
	if binary.BigEndian.Uint16(udp) != serverPort || binary.BigEndian.Uint16(udp[2:]) != ownPort || length < udpHeader || length > len(udp) {
		return nil, false
	}
	return udp[udpHeader:length], true
}

// parseDHCP returns the type of an answer to an exchange, and the lease in it; 0: it is none.
func parseDHCP(m []byte, id [4]byte, mac net.HardwareAddr) (kind byte, _ *dhcpLease) {
	if len(m) < dhcpFixed+len(dhcpMagic) || m[0] != bootAck || !bytes.Equal(m[4:8], id[:]) ||
		!bytes.Equal(m[28:28+len(mac)], mac) || !bytes.Equal(m[dhcpFixed:dhcpFixed+len(dhcpMagic)], dhcpMagic) {
		return 0, nil
	}
	address := netip.AddrFrom4([4]byte(m[16:20]))
	lease := dhcpLease{duration: maxLease}
	bits := 24
	for options := m[dhcpFixed+len(dhcpMagic):]; len(options) > 0 && options[0] != optEnd; {
		if options[0] == 0 { // padding
			options = options[1:]
			continue
		}
		if len(options) < 2 || len(options) < 2+int(options[1]) {
			return 0, nil
		}
		code, value := options[0], options[2:2+int(options[1])]
		options = options[2+len(value):]
		switch {
		case code == optType && len(value) == 1:
			kind = value[0]
		case code == optMask && len(value) == 4:
			bits, _ = net.IPMask(value).Size()
		case code == optRouter && len(value) >= 4:
			lease.router = netip.AddrFrom4([4]byte(value))
		case code == optServer && len(value) == 4:
			lease.server = netip.AddrFrom4([4]byte(value))
		case code == optDNS:
			for ; len(value) >= 4 && len(lease.servers) < maxServers; value = value[4:] {
				lease.servers = append(lease.servers, netip.AddrFrom4([4]byte(value)))
			}
		case code == optDomain:
			lease.domain = domainOf(value)
		case code == optMTU && len(value) == 2:
			lease.mtu = int(binary.BigEndian.Uint16(value))
		case code == optLease && len(value) == 4:
			lease.duration = time.Duration(binary.BigEndian.Uint32(value)) * time.Second
		}
	}
	lease.duration = min(max(lease.duration, minLease), maxLease)
	if bits < 1 || !address.IsGlobalUnicast() || !lease.server.IsValid() {
		return kind, nil
	}
	lease.address = netip.PrefixFrom(address, bits)
	return kind, &lease
}

// domainOf returns a domain as it may stand in resolv.conf; empty: it may not.
func domainOf(value []byte) string {
	name := strings.TrimRight(string(value), "\x00.")
	if len(name) > 253 || strings.Trim(strings.ToLower(name), "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" {
		return ""
	}
	return name
}
