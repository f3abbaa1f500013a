package testenv

import (
	"net"
	"net/netip"
	"testing"
)

// HostAddress returns an address of the host's that is not of loopback, which no guest reaches. The
// test is skipped where there is none.
func HostAddress(t testing.TB) netip.Addr {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, candidate := range addrs {
		if prefix, err := netip.ParsePrefix(candidate.String()); err == nil && prefix.Addr().Is4() && prefix.Addr().IsGlobalUnicast() {
			return prefix.Addr()
		}
	}
	t.Skip("the host has no address but that of loopback")
	return netip.Addr{}
}
