package tapnet

import (
	"errors"
	"fmt"
	"reflect"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network/nettest"
)

// firewall is what another program has in nftables.
type firewall struct {
	name  string
	chain func(conn *nftables.Conn) []*nftables.Chain // makes it; returns the chains that drop
	// explicit reports that it says explicitly that TCP of guests is dropped.
	explicit bool
}

func dropPolicy() *nftables.ChainPolicy {
	policy := nftables.ChainPolicyDrop
	return &policy
}

func foreignTable(conn *nftables.Conn, name string, family nftables.TableFamily) *nftables.Table {
	return conn.AddTable(&nftables.Table{Name: name, Family: family})
}

func forwardChain(conn *nftables.Conn, t *nftables.Table, name string, policy *nftables.ChainPolicy) *nftables.Chain {
	return conn.AddChain(&nftables.Chain{
		Name: name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward,
		Priority: nftables.ChainPriorityFilter, Policy: policy,
	})
}

func addRule(conn *nftables.Conn, c *nftables.Chain, parts ...match) {
	conn.AddRule(&nftables.Rule{Table: c.Table, Chain: c, Exprs: rule(parts...)})
}

func byInterface(key expr.MetaKey, name string) match {
	return match{load(key), compare(expr.CmpOpEq, ifname(name))}
}

func counter() match { return match{&expr.Counter{}} }

// firewalls are those that are met on hosts, as they are after their installation.
func firewalls() []firewall {
	both := []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6}
	return []firewall{
		{name: "none", chain: func(*nftables.Conn) []*nftables.Chain { return nil }},
		{name: "Docker's", chain: func(conn *nftables.Conn) (all []*nftables.Chain) {
			for _, family := range both {
				t := foreignTable(conn, "filter", family)
				user := conn.AddChain(&nftables.Chain{Name: "DOCKER-USER", Table: t})
				addRule(conn, user, counter(), verdict(expr.VerdictReturn))
				c := forwardChain(conn, t, "FORWARD", dropPolicy())
				addRule(conn, c, counter(), jump("DOCKER-USER"))
				addRule(conn, c, byInterface(expr.MetaKeyOIFNAME, "docker0"), ofKnownFlow(), counter(), accept())
				addRule(conn, c, byInterface(expr.MetaKeyIIFNAME, "docker0"), counter(), accept())
				all = append(all, c)
			}
			return all
		}},
		{name: "ufw's", chain: func(conn *nftables.Conn) (all []*nftables.Chain) {
			for _, family := range both {
				t := foreignTable(conn, "filter", family)
				before := conn.AddChain(&nftables.Chain{Name: "ufw-before-forward", Table: t})
				addRule(conn, before, ofKnownFlow(), counter(), accept())
				after := conn.AddChain(&nftables.Chain{Name: "ufw-after-forward", Table: t})
				c := forwardChain(conn, t, "FORWARD", dropPolicy())
				addRule(conn, c, counter(), jump(before.Name))
				addRule(conn, c, counter(), jump(after.Name))
				input := conn.AddChain(&nftables.Chain{
					Name: "INPUT", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput,
					Priority: nftables.ChainPriorityFilter, Policy: dropPolicy(),
				})
				addRule(conn, input, ofKnownFlow(), counter(), accept())
				addRule(conn, input, ipv6().icmpType(133, 136), counter(), accept())
				all = append(all, c, input)
			}
			return all
		}},
		{name: "firewalld's", chain: func(conn *nftables.Conn) []*nftables.Chain {
			c := forwardChain(conn, foreignTable(conn, "firewalld", nftables.TableFamilyINet), "filter_FORWARD", nil)
			addRule(conn, c, ofKnownFlow(), accept())
			addRule(conn, c, byInterface(expr.MetaKeyIIFNAME, "lo"), accept())
			addRule(conn, c, inState(expr.CtStateBitINVALID), drop())
			addRule(conn, c, reject())
			return []*nftables.Chain{c}
		}},
		{name: "an administrator's, against guests", explicit: true, chain: func(conn *nftables.Conn) []*nftables.Chain {
			c := forwardChain(conn, foreignTable(conn, "mine", nftables.TableFamilyINet), "forward", dropPolicy())
			tcp := match{load(expr.MetaKeyL4PROTO), compare(expr.CmpOpEq, []byte{unix.IPPROTO_TCP})}
			addRule(conn, c, fromGuests(), tcp, drop())
			return []*nftables.Chain{c}
		}},
	}
}

// rulesOf returns the rules of a chain, without what counters have counted.
func rulesOf(t testing.TB, c *nftables.Chain) []string {
	t.Helper()
	conn, err := nftables.New()
	must(t, err)
	rules, err := conn.GetRules(c.Table, c)
	must(t, err)
	var all []string
	for _, r := range rules {
		text := fmt.Sprint(r.Handle, " ")
		for _, e := range r.Exprs {
			if _, counts := e.(*expr.Counter); !counts {
				text += fmt.Sprintf("%T%+v ", e, reflect.ValueOf(e).Elem())
			}
		}
		all = append(all, text)
	}
	return all
}

// Guests reach the outside beside firewalls that forward nothing that they don't know, what
// these forbid explicitly stays forbidden, and what is closed stays closed. When the last VM
// is gone they are as they were.
func TestBesideOthers(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	out := newOutside(t)
	for _, wall := range firewalls() {
		t.Run(wall.name, func(t *testing.T) {
			conn, err := nftables.New()
			must(t, err)
			conn.FlushRuleset()
			chains := wall.chain(conn)
			must(t, conn.Flush())
			var before [][]string
			for _, c := range chains {
				before = append(before, rulesOf(t, c))
			}
			// One is there before the other comes, and one stays when the other goes.
			early := newNetwork(t, 9, nil)
			n := newNetwork(t, 2, nil)
			g, other := newGuest(t, n), newGuest(t, early)
			mustReach(t, g, "udp", farAddr, hostAddr)
			mustReach(t, g, "udp", farAddr6, hostAddr6)
			if wall.explicit {
				mustNotReach(t, g, "tcp", farAddr)
			} else {
				mustReach(t, g, "tcp", farAddr, hostAddr)
				mustReach(t, g, "tcp", farAddr6, hostAddr6)
			}
			for i, c := range chains {
				if rules := rulesOf(t, c); len(rules) != len(before[i])+len(passes(c)) {
					t.Errorf("chain %s has the rules %q", c.Name, rules)
				}
			}
			mustResolve(t, g)
			mustNotReach(t, g, "udp", wireAddr)
			mustNotReach(t, g, "udp", other.config.Guest.String())
			mustNotReach(t, out, "udp", g.config.Guest.String())
			must(t, early.Close())
			mustReach(t, g, "udp", farAddr, hostAddr)
			must(t, n.Close())
			mustBeEmpty(t)
			for i, c := range chains {
				if after := rulesOf(t, c); !reflect.DeepEqual(after, before[i]) {
					t.Errorf("chain %s has the rules %q afterwards, had %q", c.Name, after, before[i])
				}
			}
		})
	}
}

// A published port of a container, which another program leads there before anything is
// filtered, is the host's own and closed to guests.
func TestPublishedPortIsClosed(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	out := newOutside(t)
	const container, bridge = "10.88.0.2", "10.88.0.1"
	inside := nettest.New(t)
	must(t, netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "docker0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(inside.FD()),
	}))
	must(t, nettest.Configure("docker0", bridge+"/24"))
	must(t, inside.Do(func() error {
		return errors.Join(nettest.Configure("eth0", container+"/24"), nettest.Route("0.0.0.0/0", bridge, ""), serve(t, container))
	}))
	conn, err := nftables.New()
	must(t, err)
	nat := conn.AddChain(&nftables.Chain{
		Name: "PREROUTING", Table: foreignTable(conn, "nat", nftables.TableFamilyIPv4), Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
	})
	to := &expr.Immediate{Register: second, Data: ipv4Bytes(container)}
	addRule(conn, nat, toKind(unix.RTN_LOCAL, unix.RTN_LOCAL), match{to, &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: second}})
	must(t, conn.Flush())
	g := newGuest(t, newNetwork(t, 2, nil))
	mustNotReach(t, g, "tcp", hostAddr)
	mustNotReach(t, g, "udp", hostAddr)
	mustReach(t, g, "tcp", farAddr, hostAddr)
	mustReach(t, out, "tcp", hostAddr, outsideAddr)
}
