package usernet

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/outbound"
	"github.com/smolvm/smolvm/internal/network/policytest"
)

// longTime is longer than any answer is good for.
const longTime = 48 * time.Hour

// world is what a guest of these tests can reach: an outside that has all addresses, with
// servers on some ports, and a name server of the host's.
type world struct {
	*testing.T
	n     *Network
	g     *guest
	names struct {
		sync.Mutex
		addrs map[string]netip.Addr
	}
	datagrams chan string // that have arrived
	revision  int64
	ahead     time.Duration // of the clock by which answers are good
}

// newWorld makes it, with servers on these ports. The caller is in a network of its own.
func newWorld(t *testing.T, tcpPorts, udpPorts []uint16) *world {
	t.Helper()
	w := &world{T: t, datagrams: make(chan string, 1000)}
	w.names.addrs = map[string]netip.Addr{}
	out := nettest.NewOutside(t)
	if err := nettest.RunIP("route add default via " + nettest.OutsideAddr().String()); err != nil {
		t.Fatal(err)
	}
	out.Run(func() error {
		if err := nettest.RunIP("link set lo up", "route add local 0.0.0.0/0 dev lo"); err != nil {
			return err
		}
		return w.serve(tcpPorts, udpPorts)
	})
	newNameServer(t, "127.0.0.1", func(query, reply *dns.Msg) {
		name := strings.TrimSuffix(strings.ToLower(query.Question[0].Name), ".")
		w.names.Lock()
		addr, ok := w.names.addrs[name]
		w.names.Unlock()
		if !ok || query.Question[0].Qtype != dns.TypeA {
			reply.Rcode = dns.RcodeNameError
			return
		}
		head := dns.RR_Header{Name: query.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}
		reply.Answer = []dns.RR{&dns.A{Hdr: head, A: addr.AsSlice()}}
	})
	files := hostFiles(t)
	writeHostFiles(t, files, "nameserver 127.0.0.1\n", "")
	w.n = newWithFiles(t, usualLimits(), files)
	w.g = newGuest(t, w.n)
	return w
}

// serve answers on ports of all addresses: over TCP with a line after the first bytes that
// come, and with what comes then.
func (w *world) serve(tcpPorts, udpPorts []uint16) error {
	var running sync.WaitGroup
	w.Cleanup(running.Wait)
	for _, port := range tcpPorts {
		listener, err := net.Listen("tcp4", ":"+strconv.Itoa(int(port)))
		if err != nil {
			return err
		}
		w.Cleanup(func() { _ = listener.Close() })
		running.Go(func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				running.Go(func() {
					defer func() { _ = conn.Close() }()
					reader := bufio.NewReader(conn)
					if skipFirst(reader) == nil {
						_, _ = fmt.Fprintln(conn, "welcome")
						_, _ = io.Copy(conn, reader)
					}
				})
			}
		})
	}
	for _, port := range udpPorts {
		conn, err := net.ListenPacket("udp4", ":"+strconv.Itoa(int(port)))
		if err != nil {
			return err
		}
		w.Cleanup(func() { _ = conn.Close() })
		running.Go(func() {
			datagram := make([]byte, outbound.MaxDatagram)
			for {
				size, _, err := conn.ReadFrom(datagram)
				if err != nil {
					return
				}
				w.datagrams <- string(datagram[:size])
			}
		})
	}
	return nil
}

// skipFirst reads the first bytes of a connection: a record of TLS, or what comes at once.
func skipFirst(reader *bufio.Reader) error {
	const handshake, head = 22, 5
	first, err := reader.Peek(1)
	if err != nil {
		return err
	}
	size := reader.Buffered()
	if first[0] == handshake {
		if first, err = reader.Peek(head); err != nil {
			return err
		}
		size = head + int(first[3])<<8 + int(first[4])
	}
	_, err = reader.Discard(size)
	return err
}

// set puts a policy in force.
func (w *world) set(p network.Policy) {
	w.Helper()
	w.revision++
	if err := w.n.SetEgress(network.Egress{Revision: w.revision, Policy: p}); err != nil {
		w.Fatal(err)
	}
}

// resolve has the guest ask for a name, which leads to an address.
func (w *world) resolve(name string, addr netip.Addr) {
	w.Helper()
	w.names.Lock()
	w.names.addrs[strings.TrimSuffix(strings.ToLower(name), ".")] = addr
	w.names.Unlock()
	conn := packetConn{w.g.dialUDP(netip.AddrPortFrom(testConfig().Gateway, dnsPort))}
	defer func() { _ = conn.Close() }()
	ask(w.T, conn, dns.Fqdn(name), dns.TypeA)
}

// advance has the answers that the guest was given so far be of an earlier time.
func (w *world) advance(by time.Duration) {
	w.ahead += by
	ahead := w.ahead
	w.n.outbound.Names().SetClock(func() time.Time { return time.Now().Add(ahead) })
}

// first returns what a flow that states these names sends first; ok is false if no flow states
// them so.
func first(t *testing.T, f network.Flow) (text []byte, ok bool) {
	switch names := f.Names; {
	case names.SNI != "" && names.Host != "":
		return nil, false // one of them is encrypted
	case names.SNI != "" || names.Hidden && f.Protocol == smolvm.TCP:
		return policytest.ClientHello(t, names.SNI), true
	case names.Host != "":
		return []byte("GET / HTTP/1.1\r\nHost: " + names.Host + "\r\n\r\n"), true
	case names.Hidden:
		return append([]byte{0xc0, 0, 0, 0, 1}, make([]byte, 1195)...), true // as QUIC's
	}
	return []byte("\x00first"), true
}

// reaches reports whether a flow gets out.
func (w *world) reaches(f network.Flow, text []byte) bool {
	w.Helper()
	if f.Protocol == smolvm.TCP {
		conn, err := w.g.dialTCP(f.To)
		if err != nil {
			return false
		}
		defer func() { _ = conn.Close() }()
		return w.isWelcome(conn, text)
	}
	conn := w.g.dialUDP(f.To)
	defer func() { _ = conn.Close() }()
	ended := make(chan error, 1)
	if _, err := conn.Write(text); err != nil {
		w.Fatal(err)
	}
	go func() { ended <- awaitRefusal(conn) }()
	select {
	case got := <-w.datagrams:
		if got != string(text) {
			w.Errorf("%d bytes arrive, want %d", len(got), len(text))
		}
		_ = conn.Close()
		if err := <-ended; err == nil {
			w.Error("an answer comes that nobody has sent")
		}
		return true
	case err := <-ended: // the guest is told that the port is unreachable
		if !strings.Contains(fmt.Sprint(err), "refused") {
			w.Errorf("datagram: %v", err)
		}
		return false
	case <-time.After(patience):
		w.Errorf("a datagram to %s neither arrives nor is refused", f.To)
		return false
	}
}

// awaitRefusal returns the error of a connected socket of which a datagram was refused, as
// soon as there is one. The guest's stack tells it to who reads next, and wakes up nobody.
func awaitRefusal(conn net.Conn) error {
	for end := time.Now().Add(patience); ; {
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		_, err := conn.Read(make([]byte, 1))
		if !isTimeout(err) || time.Now().After(end) {
			return err
		}
	}
}

// isWelcome sends the first bytes of a connection, and reports whether they have arrived. That
// they have not, the guest is told at once.
func (w *world) isWelcome(conn net.Conn, text []byte) bool {
	w.Helper()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		w.Fatal(err)
	}
	if _, err := conn.Write(text); err != nil {
		return false
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if isTimeout(err) {
		w.Error("a connection is neither let out nor broken off")
	}
	return line == "welcome\n"
}

// carried reports whether packets of a flow are let into the network at all, and why not.
func carried(f network.Flow) (bool, string) {
	addr := f.To.Addr().Unmap()
	switch {
	case f.Protocol == "":
		return false, "no flow, but a question about several"
	case f.VMs:
		return false, "no other VMs are in the network"
	case addr.IsMulticast():
		return false, "nobody is told that a datagram to many was refused (RFC 1122, section 3.2.2)"
	case f.Protocol == network.ICMP, !addr.Is4():
		return false, "the network carries no ICMP, and this test's guest has no IPv6"
	}
	return true, ""
}

// The table of the policy, with real packets of a guest. What the verdict allows gets out,
// and the guest is told at once of what does not.
func TestConformance(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	cases := policytest.Cases(t)
	var tcpPorts, udpPorts []uint16
	seen := map[string]bool{}
	for _, c := range cases {
		port := c.Flow.To.Port()
		if key := fmt.Sprint(c.Flow.Protocol, port); !seen[key] && port != 0 {
			seen[key] = true
			if c.Flow.Protocol == smolvm.UDP {
				udpPorts = append(udpPorts, port)
			} else {
				tcpPorts = append(tcpPorts, port)
			}
		}
	}
	w := newWorld(t, tcpPorts, udpPorts)
	if err := w.serve([]uint16{80, 443, 22}, nil); err != nil { // of the host itself
		t.Fatal(err)
	}
	ran := 0
	for _, c := range cases {
		f := c.Flow.Flow
		f.To = netip.AddrPortFrom(f.To.Addr().Unmap(), f.To.Port())
		text, ok := first(t, f)
		if is, _ := carried(f); !is || !ok {
			continue
		}
		if f.Host {
			if err := nettest.RunIP("addr add " + f.To.Addr().String() + "/32 dev lo"); err != nil {
				t.Fatal(err)
			}
		}
		w.advance(longTime)
		w.set(network.Policy{})
		for _, name := range append(c.Flow.Expired, f.Names.Asked...) {
			if strings.Trim(name, ".") != "" {
				w.resolve(name, f.To.Addr())
			}
		}
		if len(c.Flow.Expired) > 0 {
			w.advance(time.Minute + outbound.AskedGrace)
		}
		w.set(c.Policy)
		if got := w.reaches(f, text); got != c.Allowed {
			t.Errorf("%s: gets out: %t, want %t", c.Name, got, c.Allowed)
		}
		if f.Host {
			if err := nettest.RunIP("addr del " + f.To.Addr().String() + "/32 dev lo"); err != nil {
				t.Fatal(err)
			}
		}
		ran++
	}
	t.Logf("%d of %d cases", ran, len(cases))
	if ran < 60 {
		t.Errorf("only %d cases have run", ran)
	}
}

// Of what the network does not carry nothing gets in, whatever the policy says.
func TestNotCarried(t *testing.T) {
	n := newNetwork(t)
	config := testConfig()
	ping := ipPacket(config.Guest, nettest.OutsideAddr(), protocolICMP, []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0})
	const etherTypeIPv6 = 0x86dd
	for name, frame := range map[string][]byte{
		"ICMP": ethernet(config, etherTypeIPv4, ping),
		"IPv6": ethernet(config, etherTypeIPv6, append([]byte{0x60}, make([]byte, 59)...)),
	} {
		if n.admit(frame) {
			t.Errorf("%s is let in", name)
		}
	}
}
