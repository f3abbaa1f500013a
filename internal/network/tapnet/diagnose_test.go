package tapnet

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network/nettest"
)

// foreign makes what another program has in nftables.
func foreign(t *testing.T, add func(conn *nftables.Conn)) {
	t.Helper()
	conn, err := nftables.New()
	must(t, err)
	add(conn)
	must(t, conn.Flush())
}

func udpOnly() match {
	return match{load(expr.MetaKeyL4PROTO), compare(expr.CmpOpEq, []byte{unix.IPPROTO_UDP})}
}

// What stops the packets of guests is named, whatever it is.
func TestDiagnose(t *testing.T) {
	for _, test := range []struct {
		name string
		// change is what is so before the network of the guest is made, and later after that.
		change, later func(t *testing.T, n *Network)
		// outside and names are parts of what is said of packets to the outside, and of questions
		// for names; empty: nothing stops them.
		outside, names string
	}{
		{name: "nothing"},
		{name: "Docker after the guest", outside: "the policy of chain FORWARD of table ip filter, which Docker has rules in", later: useFirewall("Docker's")},
		{name: "Docker before the guest", change: useFirewall("Docker's")},
		{
			name: "ufw after the guest", later: useFirewall("ufw's"),
			outside: "the policy of chain FORWARD of table ip filter, which ufw has rules in", names: "the policy of chain INPUT of table ip filter, which ufw",
		},
		{name: "ufw before the guest", change: useFirewall("ufw's")},
		{name: "firewalld after the guest", outside: "in chain filter_FORWARD of table inet firewalld, which is firewalld's", later: useFirewall("firewalld's")},
		{
			name: "a rule with a comment", outside: `in chain mine of table inet mine ("no guests here")`,
			change: func(t *testing.T, _ *Network) {
				foreign(t, func(conn *nftables.Conn) {
					c := conn.AddChain(&nftables.Chain{
						Name: "mine", Table: foreignTable(conn, "mine", nftables.TableFamilyINet), Type: nftables.ChainTypeFilter,
						Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityRaw,
					})
					conn.AddRule(&nftables.Rule{
						Table: c.Table, Chain: c, Exprs: rule(fromGuests(), udpOnly(), drop()),
						UserData: userdata.AppendString(nil, userdata.TypeComment, "no guests here"),
					})
				})
			},
		},
		{
			name: "forwarding is off", outside: "net.ipv4.ip_forward is 0",
			later: func(t *testing.T, _ *Network) { must(t, setSysctl("ipv4/ip_forward", "0")) },
		},
		{
			name: "no route", outside: "the host has no route for them",
			change: func(t *testing.T, _ *Network) { must(t, delDefault()) },
		},
		{
			name: "reverse path", outside: "reverse path filter (rp_filter): the host's route to the guest's address", names: "reverse path filter",
			later: func(t *testing.T, n *Network) {
				must(t, setSysctl("ipv4/conf/"+n.config.TAP+"/rp_filter", "1"))
				up, err := netlink.LinkByName("up0")
				must(t, err)
				const table = 100
				must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: up.Attrs().Index, Table: table, Dst: single(n.config.Guest), Scope: netlink.SCOPE_LINK}))
				r := netlink.NewRule()
				r.Table, r.Priority, r.Dst = table, 100, single(n.config.Guest)
				must(t, netlink.RuleAdd(r))
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			if !nettest.InOwnNetwork(t) {
				return
			}
			newOutside(t)
			if test.change != nil {
				test.change(t, nil)
			}
			n := newNetwork(t, 2, nil)
			if test.later != nil {
				test.later(t, n)
			}
			found, err := n.obstacles(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			said := map[string]string{}
			for _, o := range found {
				said[o.What] = o.Problem
				if o.Fix == "" {
					t.Errorf("%s: %s: there is nothing to do", o.What, o.Problem)
				}
			}
			for what, want := range map[string]string{"packets of guests to the outside": test.outside, "questions of guests for names": test.names} {
				if got := said[what]; (got == "") != (want == "") || !strings.Contains(got, want) {
					t.Errorf("%s: it says %q, want %q", what, got, want)
				}
			}
			conn, err := nftables.New()
			must(t, err)
			tables, err := conn.ListTables()
			must(t, err)
			for _, left := range tables {
				if left.Name == doctorTable {
					t.Error("the table of the diagnosis is left")
				}
			}
		})
	}
}

func useFirewall(name string) func(*testing.T, *Network) {
	return func(t *testing.T, _ *Network) {
		for _, wall := range firewalls() {
			if wall.name == name {
				foreign(t, func(conn *nftables.Conn) { wall.chain(conn) })
				return
			}
		}
		t.Fatalf("there is no firewall of the name %q", name)
	}
}

// delDefault removes the default routes.
func delDefault() error {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	for _, r := range routes {
		if r.Dst == nil || r.Dst.IP.IsUnspecified() {
			err = errors.Join(err, netlink.RouteDel(&r))
		}
	}
	return err
}

// A route that overlaps the guests' addresses is named, and nothing is left of a diagnosis.
func TestOverlapIsNamed(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	config, owner := planned(t, 2, nil)
	found, err := Diagnose(t.Context(), config, owner)
	if errors.Is(err, os.ErrPermission) {
		t.Skip(err)
	}
	if err != nil || len(found) != 0 {
		t.Errorf("where nothing is in the way: %+v, %v", found, err)
	}
	mustBeEmpty(t)
	must(t, nettest.Route(netip.MustParsePrefix("172.16.8.0/24").String(), outsideAddr, ""))
	found, err = Diagnose(t.Context(), config, owner)
	if err != nil || len(found) != 1 || !strings.Contains(found[0].Problem, "172.16.8.0/24") || found[0].Fix == "" {
		t.Errorf("with an overlapping route: %+v, %v", found, err)
	}
	mustBeEmpty(t)
	if left, err := filepath.Glob("/sys/class/net/smol-*"); err != nil || len(left) > 0 {
		t.Errorf("interfaces are left: %q, %v", left, err)
	}
}

// Whatever comes in place of what nftables says is passed over.
func FuzzParseStep(f *testing.F) {
	f.Add(uint16(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_TRACE), []byte{1, 0, 0, 0, 8, 0, 4, 0, 0, 0, 0, 3, 12, 0, 5, 0, 8, 0, 1, 0, 0, 0, 0, 0})
	f.Add(uint16(0), []byte("hello"))
	f.Fuzz(func(t *testing.T, kind uint16, data []byte) {
		if s, ok := parseStep(kind, data); !ok && s.dropped {
			t.Errorf("no step at all has dropped a packet: %+v", s)
		}
	})
}
