package tapnet

import (
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/policytest"
)

// BenchmarkPolicy measures what a policy by names costs, by turns, as the ratio of a guest that
// has one to a guest without: in time, and in processor time, of which that of guests and servers
// is a part. Their frames are as those of a VMM that leaves segmentation to the kernel. It needs a
// network of its own:
//
//	go test -c ./internal/network/tapnet
//	SMOLVM_TEST_NAMESPACE=BenchmarkPolicy unshare --net ./tapnet.test -test.run - -test.bench Policy
func BenchmarkPolicy(b *testing.B) {
	if os.Getenv("SMOLVM_TEST_NAMESPACE") != b.Name() { // as of package nettest, which can't run benchmarks
		b.Skip("it needs a network of its own; its comment says how")
	}
	must(b, nettest.Configure("lo"))
	out := newOutside(b)
	const bulk = 256 << 20
	must(b, out.Do(func() error { return serveBulk(b, netip.MustParseAddrPort(farAddr+":443"), bulk) }))
	byName := withPolicy(b, network.DefaultDeny, "deny bad.example", "allow fine.example",
		"allow 192.0.2.0/24", "allow *.other.example:443", "allow good.example")
	hello := policytest.ClientHello(b, "good.example")
	guests := map[string]guest{}
	for i, change := range []func(*network.Config){nil, byName} {
		n := newNetwork(b, network.FirstIndex+i, change)
		n.out.Load().Names().Add(netip.MustParseAddr(farAddr), "good.example", time.Hour)
		guests[[]string{"none", "by name"}[i]] = connectGuestWith(b, n, nettest.OpenOffloadingTAP)
	}
	once := func(g guest, what byte, size int) {
		conn, err := g.dialer("tcp")(netip.MustParseAddrPort(farAddr + ":443"))
		must(b, err)
		_, err = conn.Write(append(append([]byte(nil), hello...), what))
		for chunk := make([]byte, 256<<10); what == 'u' && size > 0 && err == nil; size -= len(chunk) {
			_, err = conn.Write(chunk)
		}
		must(b, err)
		must(b, conn.(*net.TCPConn).CloseWrite())
		if _, err := io.Copy(io.Discard, conn); err != nil {
			b.Fatal(err)
		}
		_ = conn.Close()
	}
	const many = 100
	for name, work := range map[string]func(g guest){
		"up":   func(g guest) { once(g, 'u', bulk) },
		"down": func(g guest) { once(g, 'd', 0) },
		"connect": func(g guest) {
			for range many {
				once(g, 'c', 0)
			}
		},
	} {
		b.Run(name, func(b *testing.B) {
			took, spent := map[string]time.Duration{}, map[string]time.Duration{}
			for b.Loop() {
				for name, g := range guests {
					began, cpu := time.Now(), processorTime(b)
					work(g)
					took[name] += time.Since(began)
					spent[name] += processorTime(b) - cpu
				}
			}
			b.ReportMetric(float64(took["by name"])/float64(took["none"]), "time-policy/none")
			b.ReportMetric(float64(spent["by name"])/float64(spent["none"]), "cpu-policy/none")
		})
	}
}

// serveBulk answers connections that begin with a record of TLS and a byte: 'd' by many bytes, all
// others, when they have ended, by a few.
func serveBulk(b *testing.B, at netip.AddrPort, size int) error {
	listener, err := net.Listen("tcp", at.String())
	if err != nil {
		return err
	}
	b.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				head := make([]byte, 5)
				if _, err := io.ReadFull(conn, head); err != nil {
					return
				}
				rest := make([]byte, int(head[3])<<8+int(head[4])+1)
				if _, err := io.ReadFull(conn, rest); err != nil {
					return
				}
				left := size
				for chunk := make([]byte, 256<<10); rest[len(rest)-1] == 'd' && left > 0; left -= len(chunk) {
					if _, err := conn.Write(chunk); err != nil {
						return
					}
				}
				_, _ = io.Copy(io.Discard, conn)
				_, _ = conn.Write([]byte("end"))
			}()
		}
	}()
	return nil
}

// processorTime returns what this process has taken so far.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
