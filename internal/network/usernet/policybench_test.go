package usernet

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

// BenchmarkPolicy measures what a policy by names costs, in processor time, as that of a busy
// host tells more than its clock: that of this process with one, to that without, by turns. The
// guest and the server are in the process too. It needs a network of its own:
//
//	go test -c ./internal/network/usernet
//	SMOLVM_TEST_NAMESPACE=BenchmarkPolicy unshare --map-root-user --net ./usernet.test -test.run - -test.bench Policy
func BenchmarkPolicy(b *testing.B) {
	if os.Getenv("SMOLVM_TEST_NAMESPACE") != b.Name() { // as of package nettest, which can't run benchmarks
		b.Skip("it needs a network of its own; its comment says how")
	}
	if err := nettest.RunIP("link set lo up"); err != nil {
		b.Fatal(err)
	}
	var listener net.Listener
	nettest.NewOutside(b).Run(func() (err error) {
		listener, err = net.Listen("tcp4", nettest.OutsideAddr().String()+":443")
		return err
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(io.Discard, conn)
				_, _ = conn.Write([]byte("end"))
				_ = conn.Close()
			}()
		}
	}()
	defer func() {
		_ = listener.Close()
		<-done
	}()
	n := newNetwork(b)
	g := newGuest(b, n)
	n.outbound.Names().Add(nettest.OutsideAddr(), "good.example", time.Hour)
	policies := map[string]network.Policy{
		"none": {},
		"by name": policytest.PolicyOf(b, network.DefaultDeny, "deny bad.example", "allow fine.example",
			"allow 192.0.2.0/24", "allow *.other.example:443", "allow good.example"),
	}
	hello := policytest.ClientHello(b, "good.example")
	var revision int64
	once := func(size int) {
		conn, err := g.dialTCP(netip.AddrPortFrom(nettest.OutsideAddr(), 443))
		if err != nil {
			b.Fatal(err)
		}
		_, err = conn.Write(hello)
		chunk := make([]byte, 256<<10)
		for sent := 0; sent < size && err == nil; sent += len(chunk) {
			_, err = conn.Write(chunk)
		}
		if err == nil {
			err = conn.(interface{ CloseWrite() error }).CloseWrite()
		}
		if err == nil {
			_, err = io.Copy(io.Discard, conn)
		}
		if err != nil {
			b.Fatal(err)
		}
		_ = conn.Close()
	}
	const many = 100
	for name, work := range map[string]func(){
		"bulk": func() { once(64 << 20) },
		"connect": func() {
			for range many {
				once(0)
			}
		},
	} {
		b.Run(name, func(b *testing.B) {
			spent := map[string]time.Duration{}
			for b.Loop() {
				for name, policy := range policies {
					revision++
					if err := n.SetEgress(network.Egress{Revision: revision, Policy: policy}); err != nil {
						b.Fatal(err)
					}
					began := processorTime(b)
					work()
					spent[name] += processorTime(b) - began
				}
			}
			b.ReportMetric(float64(spent["by name"])/float64(spent["none"]), "policy/none")
		})
	}
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
