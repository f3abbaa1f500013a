package tapnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/resolver"
)

// The world of the tests: the process is on the "host", whose only neighbor is the "outside".
const (
	hostAddr, hostAddr6       = "198.51.100.1", "2001:db8:1::1"
	outsideAddr, outsideAddr6 = "198.51.100.2", "2001:db8:1::2"
	farAddr, farAddr6         = "203.0.113.7", "2001:db8:2::7" // beyond it
	metadataAddr, wireAddr    = "169.254.169.254", "168.63.129.16"
	metadataAddr6             = "fd00:ec2::254"
	strayAddr, strayAddr6     = "172.16.9.9", "fd73:6d6f:6c76::ac10:909" // outside, as if of a VM
	echoPort                  = 7
	// patience is for what must come; impatience for what must not.
	patience, impatience = 20 * time.Second, 300 * time.Millisecond
)

// newOutside makes the outside, and connects the host to it by the interface up0.
func newOutside(t testing.TB) *nettest.Namespace {
	t.Helper()
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		t.Skip("make TAP interfaces: ", err)
	}
	_ = tun.Close()
	out := nettest.New(t)
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "out0", PeerNamespace: netlink.NsFd(out.FD())}
	must(t, netlink.LinkAdd(veth))
	t.Cleanup(func() { _ = netlink.LinkDel(veth) })
	must(t, out.Do(func() error {
		return errors.Join(
			nettest.Configure("out0", outsideAddr+"/24", outsideAddr6+"/64"),
			nettest.Configure("lo", farAddr+"/32", farAddr6+"/128", metadataAddr+"/32", wireAddr+"/32", metadataAddr6+"/128", strayAddr+"/32", strayAddr6+"/128"),
			// So a packet that is not masqueraded, or sent to a guest, finds its way.
			nettest.Route("172.16.0.0/12", hostAddr, ""), nettest.Route("fd73::/16", hostAddr6, ""),
		)
	}))
	must(t, nettest.Configure("up0", hostAddr+"/24", hostAddr6+"/64"))
	must(t, nettest.Route("0.0.0.0/0", outsideAddr, ""))
	must(t, nettest.Route("::/0", outsideAddr6, ""))
	must(t, out.Do(func() error {
		return serve(t, outsideAddr, outsideAddr6, farAddr, farAddr6, metadataAddr, wireAddr, metadataAddr6, strayAddr, strayAddr6)
	}))
	return out
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serveEcho begins the echo servers of a namespace at an address, which end with the test: what
// comes by TCP or UDP is answered with the address that it came from, and then what was sent.
func serveEcho(t testing.TB, addr string) error {
	at := net.JoinHostPort(addr, strconv.Itoa(echoPort))
	listener, err := net.Listen("tcp", at)
	if err != nil {
		return err
	}
	packets, err := net.ListenPacket("udp", at)
	if err != nil {
		_ = listener.Close()
		return err
	}
	var running sync.WaitGroup
	running.Go(func() { echo(listener) })
	running.Go(func() { echoPackets(packets) })
	t.Cleanup(func() {
		_, _ = listener.Close(), packets.Close()
		running.Wait()
	})
	return nil
}

// serve begins all servers of a namespace at its addresses, which end with the test: those of
// serveEcho, one of names, which lead to farAddr, and one of HTTP, which says hello.
func serve(t testing.TB, addrs ...string) error {
	var running sync.WaitGroup
	t.Cleanup(running.Wait)
	for _, addr := range addrs {
		if err := serveEcho(t, addr); err != nil {
			return err
		}
		for _, port := range []int{dnsPort, 80} {
			at := net.JoinHostPort(addr, strconv.Itoa(port))
			listener, err := net.Listen("tcp", at)
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = listener.Close() })
			packets, err := net.ListenPacket("udp", at)
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = packets.Close() })
			switch port {
			case dnsPort:
				handler := dns.HandlerFunc(answerNames)
				running.Go(func() { _ = (&dns.Server{Listener: listener, Handler: handler}).ActivateAndServe() })
				running.Go(func() { _ = (&dns.Server{PacketConn: packets, Handler: handler}).ActivateAndServe() })
			case 80:
				hello := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = fmt.Fprint(w, "hello ", r.Host) })
				running.Go(func() { _ = (&http.Server{Handler: hello, ReadHeaderTimeout: patience}).Serve(listener) })
			}
		}
	}
	return nil
}

func answerNames(w dns.ResponseWriter, query *dns.Msg) {
	reply := new(dns.Msg).SetReply(query)
	head := dns.RR_Header{Name: query.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}
	reply.Answer = []dns.RR{&dns.A{Hdr: head, A: net.ParseIP(farAddr)}}
	_ = w.WriteMsg(reply)
}

func echo(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer func() { _ = conn.Close() }()
			_, _ = fmt.Fprintln(conn, peerOf(conn.RemoteAddr()))
			_, _ = io.Copy(conn, conn)
		}()
	}
}

func echoPackets(conn net.PacketConn) {
	datagram := make([]byte, 1<<16)
	for {
		_, from, err := conn.ReadFrom(datagram)
		if err != nil {
			return
		}
		_, _ = conn.WriteTo([]byte(peerOf(from)+"\n"), from)
	}
}

func peerOf(addr net.Addr) string {
	return netip.MustParseAddrPort(addr.String()).Addr().Unmap().String()
}

// planned returns the configuration of the VM with a lease, and its owner.
func planned(t testing.TB, lease int, change func(*network.Config)) (network.Config, Owner) {
	t.Helper()
	at, err := network.Plan(network.TAP, lease)
	must(t, err)
	config := at.Config()
	if change != nil {
		change(&config)
	}
	owner, err := OwnedBy("data", fmt.Sprint("vm", lease))
	must(t, err)
	return config, owner
}

// newNetwork makes the network of the VM with a lease.
func newNetwork(t testing.TB, lease int, change func(*network.Config)) *Network {
	t.Helper()
	return newNetworkWith(t, lease, change, hostFiles(t))
}

// newNetworkWith is newNetwork with files by which names are resolved.
func newNetworkWith(t testing.TB, lease int, change func(*network.Config), files resolver.Files) *Network {
	t.Helper()
	config, owner := planned(t, lease, change)
	n, err := newWith(t.Context(), config, owner, files)
	if errors.Is(err, os.ErrPermission) || errors.Is(err, os.ErrNotExist) {
		t.Skip("make a TAP interface: ", err)
	}
	if err != nil {
		t.Fatalf("%v (hint: %s)", err, smolvm.HintOf(err))
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return n
}

// guest is a namespace behind a TAP interface, as the VM would be.
type guest struct {
	*nettest.Namespace
	config network.Config
}

// newGuest makes the guest of a network, with servers at its addresses.
func newGuest(t testing.TB, n *Network) guest {
	t.Helper()
	g := connectGuest(t, n)
	if g.config.Guest.IsValid() {
		addrs := []string{g.config.Guest.String()}
		if g.config.Guest6.IsValid() {
			addrs = append(addrs, g.config.Guest6.String())
		}
		must(t, g.Do(func() error { return serve(t, addrs...) }))
	}
	return g
}

// connectGuest makes the guest of a network: its interface eth0 is wired to the TAP.
func connectGuest(t testing.TB, n *Network) guest {
	t.Helper()
	return connectGuestWith(t, n, nettest.OpenTAP)
}

func connectGuestWith(t testing.TB, n *Network, open func(name string) (*os.File, error)) guest {
	t.Helper()
	g := guest{nettest.New(t), n.Config()}
	host, err := open(n.Link().TAP)
	must(t, err)
	var inside *os.File
	must(t, g.Do(func() (err error) {
		if inside, err = open("eth0"); err != nil {
			return err
		}
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC(g.config.GuestMAC)
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.LinkSetHardwareAddr(link, mac), nettest.Configure("eth0")); err != nil {
			return err
		}
		if !g.config.Guest.IsValid() {
			return nil
		}
		return g.address(g.config.Guest)
	}))
	var running sync.WaitGroup
	running.Go(func() { nettest.Pump(host, inside) })
	running.Go(func() { nettest.Pump(inside, host) })
	t.Cleanup(func() {
		_, _ = host.Close(), inside.Close()
		running.Wait()
	})
	return g
}

// address gives the guest its addresses; the first may be another than it was given.
func (g guest) address(ipv4 netip.Addr) error {
	errs := []error{
		nettest.Configure("eth0", ipv4.String()+"/32"),
		nettest.Route("0.0.0.0/0", g.config.Gateway.String(), "eth0"),
	}
	if g.config.Guest6.IsValid() {
		errs = append(errs,
			nettest.Configure("eth0", g.config.Guest6.String()+"/128"), nettest.Route("::/0", g.config.Gateway6.String(), "eth0"))
	}
	return errors.Join(errs...)
}

// errSilent means that nothing came back in time.
var errSilent = errors.New("nothing came back")

// ask sends something to an echo server, from the namespace of the calling thread, and returns
// from which address the server was asked.
func ask(protocol, addr string, port int, within time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, protocol, net.JoinHostPort(addr, strconv.Itoa(port)))
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	return converse(conn, protocol, within)
}

func converse(conn net.Conn, protocol string, within time.Duration) (string, error) {
	end := time.Now().Add(within)
	for time.Now().Before(end) {
		if protocol == "udp" { // which may be lost while neighbors are found
			if _, err := conn.Write([]byte("ping")); err != nil {
				return "", err
			}
		}
		deadline := end
		if again := time.Now().Add(time.Second); protocol == "udp" && again.Before(end) {
			deadline = again
		}
		_ = conn.SetReadDeadline(deadline)
		answer := make([]byte, 100)
		size, err := conn.Read(answer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		return strings.TrimSpace(string(answer[:size])), err
	}
	return "", errSilent
}

// place is where something is done.
type place interface{ Do(f func() error) error }

type theHost struct{}

func (theHost) Do(f func() error) error { return f() }

// reach asks an echo server from a place.
func reach(from place, protocol, addr string, within time.Duration) (peer string, err error) {
	err = from.Do(func() (err error) {
		peer, err = ask(protocol, addr, echoPort, within)
		return err
	})
	return peer, err
}

// mustReach asks an echo server, and checks by which address it was asked.
func mustReach(t testing.TB, from place, protocol, addr, as string) {
	t.Helper()
	if peer, err := reach(from, protocol, addr, patience); err != nil || peer != as {
		t.Errorf("%s to %s: it was asked by %q, %v; want %s", protocol, addr, peer, err, as)
	}
}

// mustNotReach checks that an echo server is not reached.
func mustNotReach(t testing.TB, from place, protocol, addr string) {
	t.Helper()
	if peer, err := reach(from, protocol, addr, impatience); err == nil {
		t.Errorf("%s to %s: it was asked by %q, and must not be reached", protocol, addr, peer)
	}
}

func ipv4Bytes(addr string) []byte { return netip.MustParseAddr(addr).AsSlice() }

func single24(addr string) *net.IPNet {
	return &net.IPNet{IP: net.ParseIP(addr).To4(), Mask: net.CIDRMask(24, 32)}
}

// hostFiles makes the host's files by which names are resolved: by the server outside.
func hostFiles(t testing.TB) resolver.Files {
	t.Helper()
	dir := t.TempDir()
	files := resolver.Files{ResolvConf: filepath.Join(dir, "resolv.conf"), Hosts: filepath.Join(dir, "hosts")}
	must(t, os.WriteFile(files.ResolvConf, []byte("nameserver "+outsideAddr+"\nsearch corp.example\n"), 0o600))
	must(t, os.WriteFile(files.Hosts, []byte(hostAddr+" own.example\n192.0.2.77 named.example\n2001:db8:77::1 named.example\n"), 0o600))
	return files
}

// lookUp asks the name server of a guest, and returns the addresses that it says.
func lookUp(g guest, protocol, name string, kind uint16) ([]string, error) {
	var addrs []string
	err := g.Do(func() error {
		client := dns.Client{Net: protocol, Timeout: patience}
		reply, _, err := client.Exchange(new(dns.Msg).SetQuestion(name, kind), net.JoinHostPort(g.config.Gateway.String(), "53"))
		if err != nil {
			return err
		}
		for _, record := range reply.Answer {
			switch record := record.(type) {
			case *dns.A:
				addrs = append(addrs, record.A.String())
			case *dns.AAAA:
				addrs = append(addrs, record.AAAA.String())
			}
		}
		return nil
	})
	return addrs, err
}

// mustResolve checks that the guest's name server answers, by UDP and TCP.
func mustResolve(t testing.TB, g guest) {
	t.Helper()
	for _, protocol := range []string{"udp", "tcp"} {
		if addrs, err := lookUp(g, protocol, "far.example.", dns.TypeA); err != nil || !slices.Equal(addrs, []string{farAddr}) {
			t.Errorf("a name by %s: %q, %v; want %s", protocol, addrs, err, farAddr)
		}
	}
}

// ping sends an echo request from a place, and reports whether it was answered.
func ping(from place, addr string, within time.Duration) bool {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if strings.Contains(addr, ":") {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	answered := false
	_ = from.Do(func() error {
		conn, err := net.Dial(network, addr)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		// The checksum is that of IPv4; the kernel makes that of IPv6.
		const id = 0x1234
		message := binary.BigEndian.AppendUint32([]byte{request, 0, 0, 0}, id<<16|1)
		binary.BigEndian.PutUint16(message[2:], ^(uint16(request)<<8 + id + 1))
		if _, err := conn.Write(message); err != nil {
			return err
		}
		_ = conn.SetReadDeadline(time.Now().Add(within))
		for answer := make([]byte, 100); !answered; {
			size, err := conn.Read(answer)
			if err != nil {
				return err
			}
			got := answer[:size]
			if request == 8 { // it comes with the header of IPv4
				got = got[min(20, size):]
			}
			answered = len(got) >= len(message) && got[0] == reply && binary.BigEndian.Uint16(got[4:]) == id
		}
		return nil
	})
	return answered
}
