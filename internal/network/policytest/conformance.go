package policytest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
)

const (
	// longTime is longer than any answer is good for, and shortTime than those of the world's
	// name server.
	longTime, shortTime = 48 * time.Hour, 2 * time.Minute
)

// CasePorts returns the ports that the flows of the cases are to.
func CasePorts(t testing.TB) Ports {
	t.Helper()
	var all Ports
	for _, c := range Cases(t) {
		ports := &all.TCP
		if c.Flow.Protocol == smolvm.UDP {
			ports = &all.UDP
		}
		if port := c.Flow.To.Port(); port != 0 && !slices.Contains(*ports, port) {
			*ports = append(*ports, port)
		}
	}
	return all
}

// Conformance runs the cases with real packets of the guest. What the verdict allows gets out,
// and the guest is told at once of what does not. It fails if fewer have run than there are to
// be at least.
func (w *World) Conformance(least int) {
	w.Helper()
	w.must(w.Serve(Ports{TCP: []uint16{80, 443, 22}})) // of the host itself
	cases, ran := Cases(w), 0
	for _, c := range cases {
		f := c.Flow.Flow
		f.To = netip.AddrPortFrom(f.To.Addr().Unmap(), f.To.Port())
		text, ok := first(w.T, f)
		if f.Protocol == "" || !ok || !w.Carried(f) {
			continue
		}
		own := fmt.Sprintf("%s/%d dev lo", f.To.Addr(), f.To.Addr().BitLen())
		if f.Host {
			w.must(nettest.RunIP("addr add " + own))
		}
		w.advance(longTime)
		w.Set(network.Policy{})
		for _, name := range append(c.Flow.Expired, f.Names.Asked...) {
			if strings.Trim(name, ".") != "" {
				w.Resolve(name, f.To.Addr())
			}
		}
		if len(c.Flow.Expired) > 0 {
			w.advance(shortTime)
		}
		w.Set(c.Policy)
		if got := w.reaches(f, text); got != c.Allowed {
			w.Errorf("%s: gets out: %t, want %t", c.Name, got, c.Allowed)
		}
		if f.Host {
			w.must(nettest.RunIP("addr del " + own))
		}
		ran++
	}
	w.Logf("%d of %d cases", ran, len(cases))
	if ran < least {
		w.Errorf("only %d cases have run, want %d", ran, least)
	}
}
