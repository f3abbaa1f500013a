package manager_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/tapnet"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// The addresses of the world around a host.
const (
	theHost     = "198.51.100.1"
	outsideAddr = "203.0.113.7"
	outsideName = "outside.example"
)

// outside puts a world around the host that the test is in: a router, an HTTP server that says
// who asks, and the name servers that the host is set to.
func outside(t *testing.T) *nettest.Namespace {
	t.Helper()
	out := nettest.New(t)
	ensure(t, netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "out0", PeerNamespace: netlink.NsFd(out.FD()),
	}))
	ensure(t, nettest.Configure("up0", theHost+"/24"))
	ensure(t, nettest.Route("0.0.0.0/0", "198.51.100.2", ""))
	ensure(t, out.Do(func() error {
		return errors.Join(
			nettest.Configure("out0", "198.51.100.2/24"), nettest.Configure("lo", outsideAddr+"/32"), serveHTTP(t, outsideAddr))
	}))
	config, err := dns.ClientConfigFromFile("/etc/resolv.conf")
	ensure(t, err)
	for _, server := range config.Servers {
		addr := netip.MustParseAddr(server)
		if addr.IsLoopback() {
			ensure(t, serveNames(t, server))
			continue
		}
		ensure(t, out.Do(func() error {
			return errors.Join(nettest.Configure("lo", netip.PrefixFrom(addr, addr.BitLen()).String()), serveNames(t, server))
		}))
	}
	return out
}

// newKey makes a key to log in with, in a file whose name a shell would take apart.
func newKey(t *testing.T) (path, public string) {
	t.Helper()
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		t.Skip("there is no ssh client: ", err)
	}
	path = filepath.Join(t.TempDir(), "it's a $key")
	output, err := exec.CommandContext(t.Context(), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path).CombinedOutput()
	if err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, output)
	}
	text, err := os.ReadFile(path + ".pub")
	ensure(t, err)
	return path, strings.TrimSpace(string(text))
}

func ensure(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func serveHTTP(t *testing.T, addr string) error {
	listener, err := net.Listen("tcp", net.JoinHostPort(addr, "80"))
	if err != nil {
		return err
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		_, _ = fmt.Fprintln(w, "from", from)
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return nil
}

func serveNames(t *testing.T, addr string) error {
	packets, err := net.ListenPacket("udp", net.JoinHostPort(addr, "53"))
	if err != nil {
		return err
	}
	server := &dns.Server{PacketConn: packets, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		answer := new(dns.Msg).SetReply(q)
		if q.Question[0].Name == outsideName+"." && q.Question[0].Qtype == dns.TypeA {
			record, _ := dns.NewRR(q.Question[0].Name + " 60 IN A " + outsideAddr)
			answer.Answer = append(answer.Answer, record)
		}
		_ = w.WriteMsg(answer)
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.ActivateAndServe()
	}()
	t.Cleanup(func() {
		_ = packets.Close()
		<-done
	})
	return nil
}

// fetchFrom is what a guest runs to ask an HTTP server, and prints its answer.
func fetchFrom(host string) string {
	return `printf 'GET / HTTP/1.0\r\n\r\n' | nc ` + host + ` 80 | tail -n 1`
}

// leftOnHost returns what is left on the host of the networks of VMs.
func leftOnHost(t *testing.T) string {
	t.Helper()
	var left []string
	links, err := netlink.LinkList()
	ensure(t, err)
	for _, link := range links {
		if strings.HasPrefix(link.Attrs().Name, "smol-") {
			left = append(left, link.Attrs().Name)
		}
	}
	removed, err := tapnet.Reconcile(t.Context(), func(tapnet.Owner) bool { return false })
	ensure(t, err)
	return strings.TrimSpace(strings.Join(left, " ") + fmt.Sprint(removed))
}

// nothingLeft is what [leftOnHost] returns then.
const nothingLeft = "[]"

func openOnTAP(t *testing.T, fast bool) *manager.Manager {
	t.Helper()
	config := useReal(t)
	config.Templates = manager.TemplateConfig{Disabled: !fast}
	return openAt(t, config)
}

// Guests on TAP interfaces reach the outside, by name too, and not each other; they are reached
// by a forward and by their own addresses. What a killed shim leaves on the host is removed by
// Reconcile, and a VM that is deleted leaves nothing.
func TestNetworkTAP(t *testing.T) {
	testenv.RequireQEMU(t)
	testenv.Image(t)
	if !nettest.InOwnNetwork(t) {
		return
	}
	out := outside(t)
	m := openOnTAP(t, false)
	key, public := newKey(t)
	tap := smolvm.VMConfig{
		ID: "a", Network: smolvm.Network{Mode: smolvm.NetworkTAP}, SSHHostAddr: netip.IPv4Unspecified(), AuthorizedKeys: []string{public},
	}
	a := mustRun(t, m, tap)
	tap.ID = "b"
	b := mustRun(t, m, tap)
	for _, vm := range []smolvm.VMInfo{a, b} {
		if got := sh(t, m, vm.ID, fetchFrom(outsideAddr)); got != "from "+theHost {
			t.Errorf("the outside answers VM %s by %q", vm.ID, got)
		}
		if got := sh(t, m, vm.ID, "nslookup "+outsideName); !strings.Contains(got, outsideAddr) {
			t.Errorf("VM %s is told of %s: %q", vm.ID, outsideName, got)
		}
		if len(vm.Start.Warnings) > 0 {
			t.Errorf("warnings of VM %s: %q", vm.ID, vm.Start.Warnings)
		}
		access, err := m.SSH(t.Context(), vm.ID, smolvm.SSHOptions{KeyPath: key, PublicHost: theHost})
		ensure(t, err)
		for _, line := range []string{access.Private(), access.String()} {
			if got := runSSH(t, line+" hostname"); got != vm.ID {
				t.Errorf("%s: %q", line, got)
			}
		}
		ensure(t, out.Do(func() error {
			// Whose key that is another host can't know.
			const blindly = "ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "
			if got := runSSH(t, strings.Replace(access.Public(), "ssh ", blindly, 1)+" hostname"); got != vm.ID {
				t.Errorf("from another host, %s: %q", access.Public(), got)
			}
			return nil
		}))
	}
	if a.Network.GuestIP == b.Network.GuestIP || a.Network.TAP == b.Network.TAP || a.Network.TAP == "" {
		t.Errorf("networks of two VMs: %+v, %+v", a.Network, b.Network)
	}
	if got := sh(t, m, "a", fmt.Sprintf("nc -w 3 %s 22 </dev/null 2>&1 || echo refused", b.Network.GuestIP)); !strings.Contains(got, "refused") {
		t.Errorf("one guest reaches another: %q", got)
	}
	if got := sh(t, m, "a", "ip -6 addr show dev eth0"); a.Network.GuestIP6.IsValid() && !strings.Contains(got, a.Network.GuestIP6.String()) {
		t.Errorf("IPv6 of the guest: %q", got)
	}
	// A shim that is killed can't clean up.
	start, err := proc.StartTime(a.ShimPID)
	ensure(t, err)
	ensure(t, proc.Kill(t.Context(), a.ShimPID, start))
	failed, err := m.Reconcile(t.Context())
	if err != nil || len(failed) != 1 {
		t.Errorf("Reconcile: %v, %v", failed, err)
	}
	if _, err := netlink.LinkByName(a.Network.TAP); !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("interface %s after Reconcile: %v", a.Network.TAP, err)
	}
	if got := sh(t, m, "b", fetchFrom(outsideAddr)); got != "from "+theHost {
		t.Errorf("the other VM after Reconcile: %q", got)
	}
	if _, err := m.Start(t.Context(), "a", smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, "a", fetchFrom(outsideAddr)); got != "from "+theHost {
		t.Errorf("the outside answers the VM that was started again by %q", got)
	}
	for _, id := range []string{"a", "b"} {
		ensure(t, m.Delete(t.Context(), id, smolvm.DeleteOptions{}))
	}
	if left := leftOnHost(t); left != nothingLeft {
		t.Errorf("left on the host: %s", left)
	}
}

// runSSH runs a line by a shell, and returns what it prints.
func runSSH(t *testing.T, line string) string {
	t.Helper()
	if _, err := exec.LookPath("ssh"); err != nil {
		t.Skip("there is no ssh client: ", err)
	}
	// Not what this host's user has set for ssh.
	line = strings.Replace(line, "ssh ", "ssh -F none -o BatchMode=yes ", 1)
	output, err := exec.CommandContext(t.Context(), "sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v: %s", line, err, output)
	}
	return strings.TrimSpace(string(output))
}

// In mode none a guest has no interface but loopback, and smolvm reaches it all the same.
func TestNetworkNone(t *testing.T) {
	t.Parallel()
	m := openFast(t)
	config := smolvm.VMConfig{ID: "alone", Network: smolvm.Network{Mode: smolvm.NetworkNone}}
	for _, method := range []smolvm.StartMethod{smolvm.StartBoot, smolvm.StartClone} {
		vm := mustRun(t, m, config)
		if vm.Start.Method != method || len(vm.Start.Warnings) > 0 {
			t.Errorf("started by %s, with warnings %q, want by %s", vm.Start.Method, vm.Start.Warnings, method)
		}
		if got := sh(t, m, vm.ID, "ls /sys/class/net; nc 127.0.0.1 22 </dev/null | cut -c 1-7"); got != "lo\nSSH-2.0" {
			t.Errorf("in the guest: %q", got)
		}
		if network := vm.Network; network.GuestIP.IsValid() || network.GuestMAC != "" || network.SSHHostPort != 0 {
			t.Errorf("its network: %+v", network)
		}
		if _, err := m.SSH(t.Context(), vm.ID, smolvm.SSHOptions{}); !errors.Is(err, smolvm.ErrUnsupported) || smolvm.HintOf(err) == "" {
			t.Errorf("SSH: %v", err)
		}
		if _, err := m.AddPortForward(t.Context(), vm.ID, smolvm.PortForward{GuestPort: 80}); !errors.Is(err, smolvm.ErrUnsupported) {
			t.Errorf("AddPortForward: %v", err)
		}
		if _, err := m.SetEgress(t.Context(), vm.ID, smolvm.EgressPolicy{}); !errors.Is(err, smolvm.ErrUnsupported) {
			t.Errorf("SetEgress: %v", err)
		}
		ensure(t, m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}))
		awaitTemplates(t, m)
	}
}

// Guests that were saved, or that stood by, go on with the network of the VM that they are now.
func TestNetworkTAPOfSavedGuests(t *testing.T) {
	testenv.RequireQEMU(t)
	testenv.Image(t)
	if !nettest.InOwnNetwork(t) {
		return
	}
	outside(t)
	m := openOnTAP(t, true)
	config := smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkTAP}}
	seen := map[netip.Addr]string{}
	// reaches checks that a VM has its own address alone, and that packets pass both ways.
	reaches := func(vm smolvm.VMInfo, method smolvm.StartMethod) {
		t.Helper()
		if vm.Start.Method != method || len(vm.Start.Warnings) > 0 {
			t.Errorf("VM %s was started by %s, with warnings %q, want by %s", vm.ID, vm.Start.Method, vm.Start.Warnings, method)
		}
		if other, ok := seen[vm.Network.GuestIP]; ok {
			t.Errorf("VMs %s and %s have the address %s", other, vm.ID, vm.Network.GuestIP)
		}
		seen[vm.Network.GuestIP] = vm.ID
		if got := sh(t, m, vm.ID, "ip -4 -o addr show dev eth0 | wc -l; ip -4 route | grep -c default"); got != "1\n1" {
			t.Errorf("VM %s has addresses and default routes: %q", vm.ID, got)
		}
		if got := sh(t, m, vm.ID, fetchFrom(outsideAddr)); got != "from "+theHost {
			t.Errorf("the outside answers VM %s by %q", vm.ID, got)
		}
		access, err := m.SSH(t.Context(), vm.ID, smolvm.SSHOptions{})
		ensure(t, err)
		if got := runSSH(t, access.Private()+" hostname"); got != vm.ID {
			t.Errorf("by its private address VM %s says %q", vm.ID, got)
		}
	}
	config.ID = "first"
	reaches(mustRun(t, m, config), smolvm.StartBoot)
	awaitTemplates(t, m)
	config.ID = "clone"
	clone := mustRun(t, m, config)
	reaches(clone, smolvm.StartClone)

	_, err := m.Pause(t.Context(), "clone")
	ensure(t, err)
	_, err = m.Resume(t.Context(), "clone")
	ensure(t, err)
	if got := sh(t, m, "clone", fetchFrom(outsideAddr)); got != "from "+theHost {
		t.Errorf("after a pause the outside answers by %q", got)
	}
	forked, err := m.Fork(t.Context(), "clone", smolvm.ForkOptions{IDs: []string{"fork"}})
	ensure(t, err)
	reaches(forked.Children[0], smolvm.StartSnapshot)
	_, err = m.CreateSnapshot(t.Context(), "clone", smolvm.SnapshotOptions{Name: "saved"})
	ensure(t, err)
	restored, err := m.RestoreSnapshot(t.Context(), "saved", smolvm.RestoreOptions{ID: "restored"})
	ensure(t, err)
	reaches(restored, smolvm.StartSnapshot)

	pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 1, Network: smolvm.NetworkTAP})
	ensure(t, err)
	if pool.Network != smolvm.NetworkTAP {
		t.Errorf("the pool: %+v", pool)
	}
	config.ID = "pooled"
	reaches(mustRun(t, m, config), smolvm.StartPool)
	ensure(t, m.RemovePool(t.Context(), pool.ID))

	for _, id := range []string{"first", "clone", "fork", "restored", "pooled"} {
		ensure(t, m.Delete(t.Context(), id, smolvm.DeleteOptions{}))
	}
	ensure(t, m.RemoveSnapshot(t.Context(), "saved"))
	if left := leftOnHost(t); left != nothingLeft {
		t.Errorf("left on the host: %s", left)
	}
}

// A guest on a bridge is given its address and its name servers by the bridge's network, which
// reaches it.
func TestNetworkBridge(t *testing.T) {
	testenv.RequireQEMU(t)
	testenv.Image(t)
	if !nettest.InOwnNetwork(t) {
		return
	}
	const router, guest = "192.0.2.1", "192.0.2.77"
	ensure(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
	ensure(t, nettest.Configure("br0", router+"/24"))
	ensure(t, serveHTTP(t, router))
	serveDHCP(t, "br0", router, guest)
	m := openOnTAP(t, true)
	config := smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkBridge, Bridge: "br0"}}
	for _, method := range []smolvm.StartMethod{smolvm.StartBoot, smolvm.StartClone} {
		config.ID = "by-" + string(method)
		vm := mustRun(t, m, config)
		if vm.Start.Method != method || len(vm.Start.Warnings) > 0 {
			t.Errorf("VM %s was started by %s, with warnings %q", vm.ID, vm.Start.Method, vm.Start.Warnings)
		}
		if got := sh(t, m, vm.ID, fetchFrom(router)); got != "from "+guest {
			t.Errorf("the router answers VM %s by %q", vm.ID, got)
		}
		if got := sh(t, m, vm.ID, "cat /etc/resolv.conf"); got != "nameserver "+router+"\nsearch lab.example" {
			t.Errorf("resolv.conf of VM %s is %q", vm.ID, got)
		}
		conn, err := net.Dial("tcp", net.JoinHostPort(guest, "22"))
		ensure(t, err)
		_ = conn.Close()
		if vm.Network.GuestIP.IsValid() || vm.Network.Bridge != "br0" || vm.Network.SSHHostPort != 0 {
			t.Errorf("the network of VM %s: %+v", vm.ID, vm.Network)
		}
		awaitTemplates(t, m)
		ensure(t, m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}))
	}
	if left := leftOnHost(t); left != nothingLeft {
		t.Errorf("left on the host: %s", left)
	}
}

// serveDHCP gives the hosts of a network an address.
func serveDHCP(t *testing.T, name, router, guest string) {
	t.Helper()
	server, err := server4.NewServer(name, &net.UDPAddr{IP: net.IPv4zero, Port: 67}, func(conn net.PacketConn, peer net.Addr, m *dhcpv4.DHCPv4) {
		kind := dhcpv4.MessageTypeOffer
		if m.MessageType() == dhcpv4.MessageTypeRequest {
			kind = dhcpv4.MessageTypeAck
		}
		reply, err := dhcpv4.NewReplyFromRequest(m,
			dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(net.ParseIP(guest)), dhcpv4.WithServerIP(net.ParseIP(router)),
			dhcpv4.WithRouter(net.ParseIP(router)), dhcpv4.WithDNS(net.ParseIP(router)), dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.ParseIP(router))), dhcpv4.WithOption(dhcpv4.OptDomainName("lab.example")),
			dhcpv4.WithLeaseTime(3600))
		if err == nil {
			_, _ = conn.WriteTo(reply.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: 68})
		}
	})
	ensure(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve()
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
}

// A guest on the user network gets out by IPv6 where the host does, and not to the host itself.
func TestNetworkUserIPv6(t *testing.T) {
	testenv.RequireQEMU(t)
	testenv.Image(t)
	if !nettest.InOwnNetwork(t) {
		return
	}
	const host, router, server = "2001:db8:1::1", "2001:db8:1::2", "2001:db8:2::7"
	out := outside(t)
	ensure(t, addIPv6("up0", host+"/64"))
	ensure(t, netlink.RouteAdd(&netlink.Route{Dst: everything6(), Gw: net.ParseIP(router)}))
	ensure(t, serveHTTP(t, host))
	ensure(t, out.Do(func() error {
		return errors.Join(addIPv6("out0", router+"/64"), addIPv6("lo", server+"/128"), serveHTTP(t, server))
	}))
	m := openOnTAP(t, true)
	for _, method := range []smolvm.StartMethod{smolvm.StartBoot, smolvm.StartClone} {
		vm := mustRun(t, m, smolvm.VMConfig{ID: "by-" + string(method)})
		if vm.Start.Method != method || len(vm.Start.Warnings) > 0 {
			t.Errorf("VM %s was started by %s, with warnings %q", vm.ID, vm.Start.Method, vm.Start.Warnings)
		}
		if got := sh(t, m, vm.ID, fetchFrom(server)); got != "from "+host {
			t.Errorf("the outside answers VM %s by %q", vm.ID, got)
		}
		if got := sh(t, m, vm.ID, fetchFrom(outsideAddr)); got != "from "+theHost {
			t.Errorf("by IPv4 the outside answers VM %s by %q", vm.ID, got)
		}
		for _, addr := range []string{host, vm.Network.Gateway6.String(), "fd00:ec2::254"} {
			if got := sh(t, m, vm.ID, "nc -w 5 "+addr+" 80 </dev/null 2>&1 || echo refused"); !strings.Contains(got, "refused") {
				t.Errorf("VM %s reaches %s: %q", vm.ID, addr, got)
			}
		}
		ensure(t, m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}))
		awaitTemplates(t, m)
	}
}

// addIPv6 gives an interface that is up an address, at once.
func addIPv6(name, cidr string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	addr.Flags = unix.IFA_F_NODAD
	return netlink.AddrAdd(link, addr)
}

func everything6() *net.IPNet { return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)} }
