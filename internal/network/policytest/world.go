package policytest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
)

// Patience is how long a test waits for what must come.
const Patience = 30 * time.Second

// Plane is a guest that is connected in one way, and the network that judges its flows.
type Plane struct {
	network.EgressSetter
	// DialTCP and DialUDP connect the guest to an address.
	DialTCP, DialUDP func(to netip.AddrPort) (net.Conn, error)
	// Resolver is the address of the sandbox's own resolver.
	Resolver netip.Addr
	// SetClock sets the clock by which answers of the resolver are good.
	SetClock func(clock func() time.Time)
	// Carried reports whether packets of a flow are let into the network at all.
	Carried func(network.Flow) bool
}

// World is what a guest of the tests can reach: an outside that has all addresses, with
// servers on some ports, and a name server of the host's.
type World struct {
	*testing.T
	Plane
	names struct {
		sync.Mutex
		addrs map[string]netip.Addr
	}
	datagrams chan string // that have arrived
	revision  int64
	ahead     time.Duration // of the clock by which answers are good
}

// Ports are ports at which servers are.
type Ports struct{ TCP, UDP []uint16 }

// NewWorld makes it, with servers on these ports. The caller is in a network of its own, and sets
// the plane when it has connected the guest.
func NewWorld(t *testing.T, ports Ports) *World {
	t.Helper()
	w := &World{T: t, datagrams: make(chan string, 1000)}
	w.names.addrs = map[string]netip.Addr{}
	out := nettest.NewOutside(t)
	w.must(nettest.RunIP(
		"link set lo up", "route add default via "+nettest.OutsideAddr().String(),
		"addr add 2001:db8:ffff::1/64 dev host nodad", "-6 route add default via 2001:db8:ffff::2",
	))
	out.Run(func() error {
		err := nettest.RunIP(
			"link set lo up", "addr add 2001:db8:ffff::2/64 dev outside nodad",
			"route add local 0.0.0.0/0 dev lo", "-6 route add local ::/0 dev lo table main",
		)
		if err != nil {
			return err
		}
		return w.Serve(ports)
	})
	w.serveNames(dns.HandlerFunc(w.answer))
	return w
}

func (w *World) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// serveNames begins the name server of the host's.
func (w *World) serveNames(handler dns.Handler) {
	const at = "127.0.0.1:53"
	var config net.ListenConfig
	packets, err := config.ListenPacket(w.Context(), "udp", at)
	w.must(err)
	listener, err := config.Listen(w.Context(), "tcp", at)
	w.must(err)
	for _, server := range []*dns.Server{{PacketConn: packets, Handler: handler}, {Listener: listener, Handler: handler}} {
		started, done := make(chan struct{}), make(chan struct{})
		server.NotifyStartedFunc = func() { close(started) }
		go func() {
			defer close(done)
			_ = server.ActivateAndServe()
		}()
		<-started
		w.Cleanup(func() {
			_ = server.Shutdown()
			<-done
		})
	}
}

func (w *World) answer(writer dns.ResponseWriter, query *dns.Msg) {
	reply := new(dns.Msg).SetReply(query)
	question := query.Question[0]
	w.names.Lock()
	addr, ok := w.names.addrs[normal(question.Name)]
	w.names.Unlock()
	head := dns.RR_Header{Name: question.Name, Rrtype: question.Qtype, Class: dns.ClassINET, Ttl: 60}
	switch {
	case ok && addr.Is4() && question.Qtype == dns.TypeA:
		reply.Answer = []dns.RR{&dns.A{Hdr: head, A: addr.AsSlice()}}
	case ok && addr.Is6() && question.Qtype == dns.TypeAAAA:
		reply.Answer = []dns.RR{&dns.AAAA{Hdr: head, AAAA: addr.AsSlice()}}
	default:
		reply.Rcode = dns.RcodeNameError
	}
	_ = writer.WriteMsg(reply)
}

func normal(name string) string { return strings.TrimSuffix(strings.ToLower(name), ".") }

// Files returns files in place of the host's resolv.conf and hosts, by which the world's name
// server resolves names.
func (w *World) Files() (resolvConf, hosts string) {
	w.Helper()
	dir := w.TempDir()
	resolvConf, hosts = filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "hosts")
	w.must(os.WriteFile(resolvConf, []byte("nameserver 127.0.0.1\n"), 0o600))
	w.must(os.WriteFile(hosts, nil, 0o600))
	return resolvConf, hosts
}

// Serve answers on ports of all addresses of the caller's namespace: over TCP with a line
// after the first bytes that come, and with what comes then.
func (w *World) Serve(ports Ports) error {
	var config net.ListenConfig
	var running sync.WaitGroup
	w.Cleanup(running.Wait)
	for _, port := range ports.TCP {
		listener, err := config.Listen(w.Context(), "tcp", ":"+strconv.Itoa(int(port)))
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
					defer context.AfterFunc(w.Context(), func() { _ = conn.Close() })() // it may not be told of its end
					welcome(conn)
				})
			}
		})
	}
	for _, port := range ports.UDP {
		conn, err := config.ListenPacket(w.Context(), "udp", ":"+strconv.Itoa(int(port)))
		if err != nil {
			return err
		}
		w.Cleanup(func() { _ = conn.Close() })
		running.Go(func() { w.receive(conn) })
	}
	return nil
}

func (w *World) receive(conn net.PacketConn) {
	datagram := make([]byte, 1<<16)
	for {
		size, _, err := conn.ReadFrom(datagram)
		if err != nil {
			return
		}
		w.datagrams <- string(datagram[:size])
	}
}

func welcome(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	reader := bufio.NewReader(conn)
	if skipFirst(reader) == nil {
		_, _ = fmt.Fprintln(conn, "welcome")
		_, _ = io.Copy(conn, reader)
	}
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

// Set puts a policy in force.
func (w *World) Set(p network.Policy) {
	w.Helper()
	w.revision++
	w.must(w.SetEgress(network.Egress{Revision: w.revision, Policy: p}))
	if got := w.EgressRevision(); got != w.revision {
		w.Errorf("revision %d is in force, want %d", got, w.revision)
	}
}

// Resolve has the guest ask for a name, which leads to an address.
func (w *World) Resolve(name string, addr netip.Addr) {
	w.Helper()
	w.names.Lock()
	w.names.addrs[normal(name)] = addr
	w.names.Unlock()
	conn, err := w.DialUDP(netip.AddrPortFrom(w.Resolver, 53))
	w.must(err)
	defer func() { _ = conn.Close() }()
	kind := dns.TypeA
	if addr.Is6() {
		kind = dns.TypeAAAA
	}
	client := dns.Client{Timeout: Patience}
	question := new(dns.Msg).SetQuestion(dns.Fqdn(name), kind)
	if _, _, err := client.ExchangeWithConn(question, &dns.Conn{Conn: packetConn{conn}}); err != nil {
		w.Fatalf("ask for %s: %v", name, err)
	}
}

// packetConn makes a connected conn a [net.PacketConn], by which the client tells UDP from TCP.
type packetConn struct{ net.Conn }

func (c packetConn) ReadFrom(p []byte) (int, net.Addr, error) {
	n, err := c.Read(p)
	return n, c.RemoteAddr(), err
}

func (c packetConn) WriteTo(p []byte, _ net.Addr) (int, error) { return c.Write(p) }

// advance has the answers that the guest was given so far be of an earlier time.
func (w *World) advance(by time.Duration) {
	w.ahead += by
	ahead := w.ahead
	w.SetClock(func() time.Time { return time.Now().Add(ahead) })
}

// first returns what a flow that states these names sends first; ok is false if no flow states
// them so.
func first(t *testing.T, f network.Flow) (text []byte, ok bool) {
	switch names := f.Names; {
	case names.SNI != "" && names.Host != "":
		return nil, false // one of them is encrypted
	case names.SNI != "" || names.Hidden && f.Protocol == smolvm.TCP:
		return ClientHello(t, names.SNI), true
	case names.Host != "":
		return []byte("GET / HTTP/1.1\r\nHost: " + names.Host + "\r\n\r\n"), true
	case names.Hidden:
		return append([]byte{0xc0, 0, 0, 0, 1}, make([]byte, 1195)...), true // as QUIC's
	}
	return []byte("\x00first"), true
}

// reaches reports whether a flow gets out.
func (w *World) reaches(f network.Flow, text []byte) bool {
	w.Helper()
	if f.Protocol == smolvm.TCP {
		conn, err := w.DialTCP(f.To)
		if err != nil {
			return false
		}
		defer func() { _ = conn.Close() }()
		return w.isWelcome(conn, text)
	}
	conn, err := w.DialUDP(f.To)
	w.must(err)
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
		if !isRefusal(err) {
			w.Errorf("datagram: %v", err)
		}
		return false
	case <-time.After(Patience):
		w.Errorf("a datagram to %s neither arrives nor is refused", f.To)
		return false
	}
}

// isRefusal reports whether an error tells that nobody takes a datagram, or that it is forbidden.
func isRefusal(err error) bool {
	return errors.Is(err, os.ErrPermission) || strings.Contains(fmt.Sprint(err), "refused") ||
		strings.Contains(fmt.Sprint(err), "no route to host")
}

// awaitRefusal returns the error of a connected socket of which a datagram was refused, as
// soon as there is one. A stack in user space tells it to who reads next, and wakes up nobody.
func awaitRefusal(conn net.Conn) error {
	for end := time.Now().Add(Patience); ; {
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		_, err := conn.Read(make([]byte, 1))
		if !isTimeout(err) || time.Now().After(end) {
			return err
		}
	}
}

func isTimeout(err error) bool {
	timeout, ok := errors.AsType[net.Error](err)
	return ok && timeout.Timeout()
}

// isWelcome sends the first bytes of a connection, and reports whether they have arrived. That
// they have not, the guest is told at once.
func (w *World) isWelcome(conn net.Conn, text []byte) bool {
	w.Helper()
	w.must(conn.SetDeadline(time.Now().Add(Patience)))
	if _, err := conn.Write(text); err != nil {
		return false
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if isTimeout(err) {
		w.Error("a connection is neither let out nor broken off")
	}
	return line == "welcome\n"
}
