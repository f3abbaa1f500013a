package manager_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network/nettest"
)

// What stops guests' packets is found on a host that has no route, and nothing on one that has.
func TestCheckNetwork(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	m := openFake(t)
	tap := func() smolvm.Finding {
		t.Helper()
		findings, err := m.CheckNetwork(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(findings) < 3 {
			t.Fatalf("it finds %+v", findings)
		}
		return findings[2]
	}
	found := tap()
	if strings.Contains(found.Problem, "not checked") {
		t.Skip(found.Problem)
	}
	if found.Severity != smolvm.SeverityError || !strings.Contains(found.Problem, "no route") || found.Fix == "" {
		t.Errorf("without a route it finds %+v", found)
	}
	err := errors.Join(
		netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "up1"}),
		nettest.Configure("up0", "198.51.100.1/24"), nettest.Configure("up1"), nettest.Route("0.0.0.0/0", "198.51.100.2", ""))
	if err != nil {
		t.Fatal(err)
	}
	if found := tap(); found.Severity != smolvm.SeverityOK {
		t.Errorf("with a route it finds %+v", found)
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if strings.HasPrefix(link.Attrs().Name, "smol-") {
			t.Errorf("interface %s is left", link.Attrs().Name)
		}
	}
}
