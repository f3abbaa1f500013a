package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/tapnet"
	"github.com/smolvm/smolvm/internal/network/usernet"
)

const (
	// networkEnv has the number of rounds in which networks are compared.
	networkEnv = "SMOLVM_BENCH_NETWORK"
	// transferTime is how long each measurement of throughput takes.
	transferTime = time.Second
	// connections is how many are made in each measurement of their rate, by so many at
	// once.
	connections, dialers = 2000, 8
	networkPort          = 443
	serverName           = "good.example"
)

// TestNetwork compares networks of guests: ours, with and without a policy, with those that
// other programs make, by turns. A guest is a network namespace here, with a TAP interface in
// place of a NIC, so that no emulated CPU is measured. Its output has the table.
//
//	make bench-net
func TestNetwork(t *testing.T) {
	rounds, _ := strconv.Atoi(os.Getenv(networkEnv))
	if rounds < 1 {
		t.Skip("networks are measured by make bench-net")
	}
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	out := nettest.NewOutside(t)
	check(t, nettest.RunIP("route add default via "+nettest.OutsideAddr().String()))
	serveTransfers(t, out.Namespace)
	planes := []*plane{
		userPlane(t, "user", network.Policy{}, network.UserMTU),
		userPlane(t, "user, policy", namePolicy(t), network.UserMTU),
		userPlane(t, "user at slirp's MTU", network.Policy{}, 1500),
		slirpPlane(t),
		barePlane(t, out.Namespace), // before there are rules
		tapPlane(t),
	}
	planes = slices.DeleteFunc(planes, func(p *plane) bool { return p == nil })
	for range rounds {
		for _, m := range measurements() {
			for _, p := range planes {
				got, err := m.take(p)
				if err != nil {
					t.Fatalf("%s by %s: %v", m.name, p.name, err)
				}
				p.results[m.name] = append(p.results[m.name], got)
			}
		}
	}
	t.Log("\n" + table(planes))
}

// namePolicy has rules about names, so each flow waits for its first bytes.
func namePolicy(t *testing.T) network.Policy {
	t.Helper()
	p := network.Policy{Default: network.DefaultDeny}
	for _, text := range []string{"deny bad.example", "allow *.other.example:443", "deny 192.0.2.0/24", "allow " + nettest.OutsideAddr().String() + ":443"} {
		rule, err := network.ParseRule(text)
		check(t, err)
		p.Rules = append(p.Rules, rule)
	}
	return p
}

// plane is one way to connect a guest.
type plane struct {
	name    string
	than    string // the plane that it is compared with
	guest   *nettest.Namespace
	results map[string][]float64
}

func newPlane(t *testing.T, name, than string) *plane {
	t.Helper()
	return &plane{name: name, than: than, guest: nettest.New(t), results: map[string][]float64{}}
}

// connect gives the guest an interface whose frames come from and go to a file.
func (p *plane) connect(t *testing.T, link *os.File, mac, addr, gateway string, mtu int) {
	t.Helper()
	var tap *os.File
	check(t, p.guest.Do(func() (err error) {
		if tap, err = nettest.OpenTAP("tap0"); err != nil {
			return err
		}
		return errors.Join(nettest.RunIP(fmt.Sprintf("link set tap0 address %s mtu %d", mac, mtu)), nettest.Configure("tap0", addr), nettest.Route("0.0.0.0/0", gateway, "tap0"))
	}))
	var pumps sync.WaitGroup
	pumps.Go(func() { nettest.Pump(link, tap) })
	pumps.Go(func() { nettest.Pump(tap, link) })
	t.Cleanup(func() {
		_, _ = tap.Close(), link.Close()
		pumps.Wait()
	})
}

const guestMAC = "02:00:ac:10:00:02"

func userPlane(t *testing.T, name string, policy network.Policy, mtu int) *plane {
	t.Helper()
	p := newPlane(t, name, "slirp4netns")
	if policy.Restricts() {
		p.than = "user"
	}
	n, err := usernet.New(network.Config{
		Prefix: netip.MustParsePrefix("10.0.2.0/24"), Gateway: netip.MustParseAddr("10.0.2.2"),
		Guest: netip.MustParseAddr("10.0.2.15"), GuestMAC: guestMAC,
		Egress: &network.Egress{Revision: 1, Policy: policy}, MTU: mtu,
	})
	check(t, err)
	t.Cleanup(func() { _ = n.Close() })
	p.connect(t, duplicate(t, n.Link().Socket), guestMAC, "10.0.2.15/24", "10.0.2.2", mtu)
	return p
}

// duplicate returns a file of the same socket, as the network's own is its to close.
func duplicate(t *testing.T, file *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	check(t, err)
	check(t, unix.SetNonblock(fd, true))
	return os.NewFile(uintptr(fd), "link")
}

func tapPlane(t *testing.T) *plane {
	t.Helper()
	p := newPlane(t, "tap", "bare TAP")
	lease := network.FirstIndex
	a, err := network.Plan(network.TAP, lease)
	check(t, err)
	config := network.Config{
		Mode: a.Mode, Prefix: a.Prefix, Gateway: a.Gateway, Guest: a.Guest, GuestMAC: guestMAC, TAP: a.TAP,
	}
	n, err := tapnet.New(t.Context(), config, tapnet.Owner{VM: "bench", Directory: "bench", PID: os.Getpid()})
	if err != nil {
		t.Logf("tap is left out: %v", err)
		return nil
	}
	t.Cleanup(func() { _ = n.Close() })
	link, err := nettest.OpenTAP(a.TAP)
	check(t, err)
	p.connect(t, link, guestMAC, a.Guest.String()+"/32", a.Gateway.String(), 1500)
	return p
}

// barePlane is a TAP interface of another host with the same outside, and nothing else.
func barePlane(t *testing.T, out *nettest.Namespace) *plane {
	t.Helper()
	p := newPlane(t, "bare TAP", "")
	host := nettest.New(t)
	var link *os.File
	check(t, nettest.RunIP(fmt.Sprintf("link add up1 netns /proc/%d/fd/%d type veth peer name outside1 netns /proc/%d/fd/%d",
		os.Getpid(), host.FD(), os.Getpid(), out.FD())))
	check(t, out.Do(func() error {
		return errors.Join(nettest.Configure("outside1", "192.0.2.2/24"), nettest.Route("203.0.113.0/24", "192.0.2.1", ""))
	}))
	check(t, host.Do(func() (err error) {
		if link, err = nettest.OpenTAP("bare0"); err != nil {
			return err
		}
		return errors.Join(
			nettest.Configure("up1", "192.0.2.1/24"), nettest.Configure("bare0", "203.0.113.1/24"),
			nettest.Route("0.0.0.0/0", "192.0.2.2", ""),
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o600),
		)
	}))
	p.connect(t, link, guestMAC, "203.0.113.2/24", "203.0.113.1", 1500)
	return p
}

func slirpPlane(t *testing.T) *plane {
	t.Helper()
	p := newPlane(t, "slirp4netns", "")
	ready, told, err := os.Pipe()
	check(t, err)
	defer func() { _ = ready.Close() }()
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.guest.FD())
	started := start(t, []*os.File{told}, "slirp4netns", "--configure", "--mtu=1500", "--ready-fd=3", "--netns-type=path", path, "tap0")
	_ = told.Close()
	if !started {
		return nil
	}
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		t.Logf("slirp4netns is left out: %v", err)
		return nil
	}
	return p
}

// start starts a program that ends with the test, and reports whether there is one.
func start(t *testing.T, files []*os.File, name string, args ...string) bool {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...) //nolint:gosec // a program of the host's
	cmd.ExtraFiles = files
	if err := cmd.Start(); err != nil {
		t.Logf("%s is left out: %v", name, err)
		return false
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return true
}

// serveTransfers begins the server outside. A client says first what it wants, as a request
// of HTTP/1: to send until it has ended its side, or to be sent for [transferTime].
func serveTransfers(t *testing.T, out *nettest.Namespace) {
	t.Helper()
	var listener net.Listener
	check(t, out.Do(func() (err error) {
		listener, err = net.Listen("tcp4", ":"+strconv.Itoa(networkPort))
		return err
	}))
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer func() { _ = conn.Close() }()
				serveTransfer(conn)
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		running.Wait()
	})
}

func serveTransfer(conn net.Conn) {
	reader := bufio.NewReader(conn)
	request := ""
	for line := "-"; line != "\r\n"; request += line {
		var err error
		if line, err = reader.ReadString('\n'); err != nil {
			return
		}
	}
	if !strings.HasPrefix(request, "GET /down ") {
		n, _ := io.Copy(io.Discard, reader)
		_, _ = fmt.Fprintln(conn, n)
		return
	}
	chunk := make([]byte, 256<<10)
	for end := time.Now().Add(transferTime); time.Now().Before(end); {
		if _, err := conn.Write(chunk); err != nil {
			return
		}
	}
}

type measurement struct {
	name, unit string
	take       func(p *plane) (float64, error)
}

func measurements() []measurement {
	list := []measurement{{"connections", "per s", (*plane).connectionRate}}
	for _, flows := range []int{1, 16} {
		for _, way := range []string{"up", "down"} {
			name := fmt.Sprintf("%s, %d", way, flows)
			list = append(list, measurement{name, "MB/s", func(p *plane) (float64, error) { return p.throughput(way, flows) }})
		}
	}
	return list
}

// dial connects the guest to the server, and asks it. It runs in the guest's namespace.
func dial(way string) (*net.TCPConn, error) {
	conn, err := net.DialTimeout("tcp4", net.JoinHostPort(nettest.OutsideAddr().String(), strconv.Itoa(networkPort)), 20*time.Second)
	if err != nil {
		return nil, err
	}
	_, err = fmt.Fprintf(conn, "GET /%s HTTP/1.1\r\nHost: %s\r\n\r\n", way, serverName)
	return conn.(*net.TCPConn), err
}

// throughput returns how many millions of bytes get through in a second.
func (p *plane) throughput(way string, flows int) (float64, error) {
	var total atomic.Int64
	var running sync.WaitGroup
	failed := make(chan error, flows)
	begun := time.Now()
	for range flows {
		var conn *net.TCPConn
		if err := p.guest.Do(func() (err error) { conn, err = dial(way); return err }); err != nil {
			return 0, err
		}
		running.Go(func() {
			defer func() { _ = conn.Close() }()
			n, err := transfer(conn, way)
			total.Add(n)
			failed <- err
		})
	}
	running.Wait()
	elapsed := time.Since(begun)
	var errs []error
	for range flows {
		errs = append(errs, <-failed)
	}
	return float64(total.Load()) / 1e6 / elapsed.Seconds(), errors.Join(errs...)
}

// transfer returns how many bytes have got through.
func transfer(conn *net.TCPConn, way string) (n int64, err error) {
	if way == "down" {
		return io.Copy(struct{ io.Writer }{io.Discard}, conn)
	}
	chunk := make([]byte, 256<<10)
	for end := time.Now().Add(transferTime); err == nil && time.Now().Before(end); {
		_, err = conn.Write(chunk)
	}
	if err == nil {
		err = conn.CloseWrite()
	}
	if err == nil {
		_, err = fmt.Fscan(conn, &n)
	}
	return n, err
}

// connectionRate returns how many connections are made in a second, each with a question and
// an answer.
func (p *plane) connectionRate() (float64, error) {
	var running sync.WaitGroup
	failed := make(chan error, dialers)
	begun := time.Now()
	for range dialers {
		running.Go(func() {
			failed <- p.guest.Do(func() error {
				for range connections / dialers {
					conn, err := dial("none")
					if err != nil {
						return err
					}
					if err := conn.CloseWrite(); err != nil {
						return err
					}
					_, err = io.Copy(io.Discard, conn)
					_ = conn.Close()
					if err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	running.Wait()
	var errs []error
	for range dialers {
		errs = append(errs, <-failed)
	}
	return connections / time.Since(begun).Seconds(), errors.Join(errs...)
}

// table returns the medians, and their ratios to those of the plane that each is compared with.
func table(planes []*plane) string {
	var text strings.Builder
	text.WriteString("| Network |")
	for _, m := range measurements() {
		fmt.Fprintf(&text, " %s, %s |", m.name, m.unit)
	}
	text.WriteString("\n|---|" + strings.Repeat("---|", len(measurements())) + "\n")
	medianOf := func(p *plane, name string) float64 {
		sorted := slices.Sorted(slices.Values(p.results[name]))
		return sorted[len(sorted)/2]
	}
	for _, p := range planes {
		fmt.Fprintf(&text, "| %s |", p.name)
		at := slices.IndexFunc(planes, func(other *plane) bool { return other.name == p.than })
		for _, m := range measurements() {
			got := medianOf(p, m.name)
			fmt.Fprintf(&text, " %.0f", got)
			if at >= 0 {
				fmt.Fprintf(&text, " (%.2f × %s)", got/medianOf(planes[at], m.name), p.than)
			}
			text.WriteString(" |")
		}
		text.WriteString("\n")
	}
	return text.String()
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
