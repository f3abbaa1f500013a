package tapnet

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network"
)

const (
	// tableName is the one table, of family inet, that smolvm has.
	tableName = "smolvm"
	// layout is the number of the rules below. Whoever finds a table with another number
	// writes all rules anew, beside the elements that there are: raise it with each change
	// of a rule, and give a set another name if its type changes.
	layout = 1
	// layoutPrefix and the number are the name of an empty chain.
	layoutPrefix = "layout-"
	// openSet has the interfaces of guests that may reach each other.
	openSet = "open"
	// namedSet has the interfaces at which the gateway answers questions for names.
	namedSet = "named"
	// portPrefix and the name of its interface are the name of a VM's own chain; see
	// [addPort].
	portPrefix = "port-"
)

func table() *nftables.Table {
	return &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
}

// perGuest are the sets whose elements belong to VMs, and have their owners as comments.
func perGuest() []*nftables.Set {
	t := table()
	sets := []*nftables.Set{
		{Table: t, Name: openSet, KeyType: nftables.TypeIFName},
		{Table: t, Name: namedSet, KeyType: nftables.TypeIFName},
	}
	for _, v := range []version{ipv4(), ipv6()} {
		pair := nftables.MustConcatSetType(nftables.TypeIFName, v.address)
		for _, name := range []string{v.sources, v.gateways, v.opened} {
			sets = append(sets, &nftables.Set{Table: t, Name: name, KeyType: pair})
		}
		sets = append(sets, &nftables.Set{Table: t, Name: v.guests, KeyType: v.address})
	}
	return sets
}

// set returns one of the sets.
func set(name string) *nftables.Set {
	sets := append(perGuest(), networkSets()...)
	return sets[slices.IndexFunc(sets, func(s *nftables.Set) bool { return s.Name == name })]
}

// networkSets are the sets of networks, which belong to no VM.
func networkSets() []*nftables.Set {
	t := table()
	var sets []*nftables.Set
	for _, v := range []version{ipv4(), ipv6()} {
		for _, name := range []string{v.closed, v.pooled} {
			sets = append(sets, &nftables.Set{Table: t, Name: name, KeyType: v.address, Interval: true})
		}
	}
	return sets
}

// chain is a chain and its rules.
type chain struct {
	name     string
	kind     nftables.ChainType // empty: it is jumped to
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	rules    []match
}

// chains returns all of them, those that others jump to first.
func chains() []chain {
	v4, v6 := ipv4(), ipv6()
	// Neighbor solicitations and advertisements; the kernel takes none that was forwarded.
	neighbors := v6.icmpType(135, 136)
	return []chain{
		{name: "from_guest", rules: []match{
			rule(inState(expr.CtStateBitINVALID), drop()), // no address would be put in the guest's place
			rule(ofKnownFlow(), accept()),
			rule(v4.guestAddressIn(v4.to, v4.opened, false), accept()),
			rule(v6.guestAddressIn(v6.to, v6.opened, false), accept()),
			rule(v4.addressIn(v4.to, v4.closed), reject()),
			rule(v6.addressIn(v6.to, v6.closed), reject()),
			rule(toGuests(), guestIn(expr.MetaKeyIIFNAME, openSet), guestIn(expr.MetaKeyOIFNAME, openSet), accept()),
			rule(toGuests(), reject()),
			rule(v4.addressIn(v4.to, v4.pooled), reject()),
			rule(v6.addressIn(v6.to, v6.pooled), reject()),
		}},
		{name: "to_guest", rules: []match{
			rule(ofKnownFlow(), accept()),
			rule(drop()),
		}},
		{ // After connections are known (-200), before anybody changes destinations (-100).
			name: "prerouting", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityMangle,
			rules: []match{
				rule(notFromGuests(), accept()),
				rule(v4.guestAddressIn(v4.from, v4.sources, true), drop()),
				rule(neighbors, accept()),
				rule(v6.guestAddressIn(v6.from, v6.sources, true), drop()),
				rule(ofKnownFlow(), accept()),
				rule(v4.guestAddressIn(v4.to, v4.gateways, false), accept()), // input decides
				rule(v6.guestAddressIn(v6.to, v6.gateways, false), accept()),
				rule(toKind(unix.RTN_LOCAL, unix.RTN_LOCAL), reject()),
				rule(toKind(unix.RTN_BROADCAST, unix.RTN_MULTICAST), drop()), // and anycast, which is between them
			},
		},
		{
			name: "input", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookInput, priority: nftables.ChainPriorityFilter,
			rules: []match{
				rule(notFromGuests(), accept()),
				rule(ofKnownFlow(), accept()),
				rule(neighbors, accept()),
				rule(v4.icmpType(v4.echo, v4.echo), accept()),
				rule(v6.icmpType(v6.echo, v6.echo), accept()),
				// Prerouting lets nothing get here but what is to the gateway.
				rule(guestIn(expr.MetaKeyIIFNAME, namedSet), isQuestion(unix.IPPROTO_UDP), accept()),
				rule(guestIn(expr.MetaKeyIIFNAME, namedSet), isQuestion(unix.IPPROTO_TCP), accept()),
				rule(reject()),
			},
		},
		{
			name: "forward", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter,
			rules: []match{
				rule(fromGuests(), match{&expr.Verdict{Kind: expr.VerdictGoto, Chain: "from_guest"}}),
				rule(toGuests(), match{&expr.Verdict{Kind: expr.VerdictGoto, Chain: "to_guest"}}),
			},
		},
		{
			name: "postrouting", kind: nftables.ChainTypeNAT,
			hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource,
			rules: []match{
				rule(notToGuests(), v4.addressIn(v4.from, v4.guests), match{&expr.Masq{}}),
				rule(notToGuests(), v6.addressIn(v6.from, v6.guests), match{&expr.Masq{}}),
			},
		},
	}
}

// state is what is in nftables, as far as it concerns the networks of VMs.
type state struct {
	chains []*nftables.Chain // of all tables
}

func look(conn *nftables.Conn) (state, error) {
	chains, err := conn.ListChains()
	if err != nil {
		return state{}, fmt.Errorf("list the chains of nftables: %w", err)
	}
	return state{chains}, nil
}

// ours returns the chains of the table of smolvm.
func (s state) ours() []*nftables.Chain {
	return slices.DeleteFunc(slices.Clone(s.chains), func(c *nftables.Chain) bool { return !isOurs(c.Table) })
}

func isOurs(t *nftables.Table) bool {
	return t.Name == tableName && t.Family == nftables.TableFamilyINet
}

// hasTable reports whether the table is there with the rules of this program.
func (s state) hasTable() bool {
	return slices.ContainsFunc(s.ours(), func(c *nftables.Chain) bool { return c.Name == fmt.Sprint(layoutPrefix, layout) })
}

// ensureTable adds to a transaction what is missing of the table. Rules of another layout are
// replaced; elements stay.
func (s state) ensureTable(conn *nftables.Conn) error {
	if s.hasTable() {
		return nil
	}
	conn.AddTable(table())
	for _, set := range perGuest() {
		if err := conn.AddSet(set, nil); err != nil {
			return err
		}
	}
	for _, set := range networkSets() {
		if err := conn.AddSet(set, nil); err != nil {
			return err
		}
	}
	for _, v := range []version{ipv4(), ipv6()} {
		conn.FlushSet(set(v.closed))
		if err := conn.SetAddElements(set(v.closed), intervals(network.ClosedNetworks(), v)); err != nil {
			return err
		}
	}
	all := chains()
	added := make([]*nftables.Chain, len(all))
	for i, c := range all {
		added[i] = conn.AddChain(&nftables.Chain{Name: c.name, Table: table(), Type: c.kind, Hooknum: c.hook, Priority: c.priority})
		conn.FlushChain(added[i])
	}
	for i, c := range all {
		for _, r := range c.rules {
			conn.AddRule(&nftables.Rule{Table: table(), Chain: added[i], Exprs: r})
		}
	}
	for _, c := range s.ours() {
		if strings.HasPrefix(c.Name, layoutPrefix) {
			conn.DelChain(c)
		}
	}
	conn.AddChain(&nftables.Chain{Name: fmt.Sprint(layoutPrefix, layout), Table: table()})
	return nil
}

// intervals returns the elements of a set of networks: those of a version, each as its first
// address and the one after its last.
func intervals(networks []netip.Prefix, v version) []nftables.SetElement {
	var elements []nftables.SetElement
	for _, n := range networks {
		if n.Addr().BitLen() != int(v.length)*8 {
			continue
		}
		elements = append(elements, nftables.SetElement{Key: n.Masked().Addr().AsSlice()})
		if next := network.Last(n).Next(); next.IsValid() {
			elements = append(elements, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
		}
	}
	return elements
}

// hasPool reports whether a pool is in the table.
func hasPool(conn *nftables.Conn, pool netip.Prefix) (bool, error) {
	elements, err := conn.GetSetElements(set(ipv4().pooled))
	if err != nil {
		return false, fmt.Errorf("list the pools of addresses in nftables: %w", err)
	}
	return slices.ContainsFunc(elements, func(e nftables.SetElement) bool {
		return !e.IntervalEnd && slices.Equal(e.Key, pool.Addr().AsSlice())
	}), nil
}

// addPool adds a pool, and its addresses of IPv6, to a transaction.
func addPool(conn *nftables.Conn, c network.Config) error {
	err := conn.SetAddElements(set(ipv4().pooled), intervals([]netip.Prefix{c.Prefix}, ipv4()))
	if err == nil && c.Prefix6.IsValid() {
		err = conn.SetAddElements(set(ipv6().pooled), intervals([]netip.Prefix{c.Prefix6}, ipv6()))
	}
	return err
}

// element is an element of a set.
type element struct {
	set string
	nftables.SetElement
}

// ifname returns the name of an interface as a key.
func ifname(name string) []byte {
	key := make([]byte, unix.IFNAMSIZ)
	copy(key, name)
	return key
}

// elementsOf returns the elements of a VM. Named reports that it has a name server.
func elementsOf(c network.Config, owner Owner, named bool) []element {
	var all []element
	add := func(set string, key []byte) {
		all = append(all, element{set, nftables.SetElement{Key: key, Comment: owner.String()}})
	}
	tap := ifname(c.TAP)
	pair := func(addr netip.Addr) []byte { return append(slices.Clone(tap), addr.AsSlice()...) }
	addresses := func(v version, guest, gateway netip.Addr) {
		if !guest.IsValid() {
			return
		}
		add(v.sources, pair(guest))
		add(v.gateways, pair(gateway))
		add(v.guests, guest.AsSlice())
	}
	addresses(ipv4(), c.Guest, c.Gateway)
	addresses(ipv6(), c.Guest6, c.Gateway6)
	for _, addr := range c.Metadata {
		if addr = addr.Unmap(); addr.Is4() {
			add(ipv4().opened, pair(addr))
		} else {
			add(ipv6().opened, pair(addr))
		}
	}
	if c.OpenToVMs {
		add(openSet, tap)
	}
	if named {
		add(namedSet, tap)
	}
	return all
}

// addGuest adds the elements of a VM to a transaction.
func addGuest(conn *nftables.Conn, c network.Config, owner Owner, named bool) error {
	for _, e := range elementsOf(c, owner, named) {
		if err := conn.SetAddElements(set(e.set), []nftables.SetElement{e.SetElement}); err != nil {
			return err
		}
	}
	return nil
}

// dropStale adds the removal of what a dead owner has left under a VM's name and addresses to a
// transaction. To add an element that is there would leave it with the owner that it has.
func (s state) dropStale(conn *nftables.Conn, c network.Config) error {
	for _, chain := range s.ours() {
		if chain.Name == portPrefix+c.TAP {
			conn.FlushChain(chain)
			conn.DelChain(chain)
		}
	}
	if !s.hasTable() || !c.Guest.IsValid() {
		return nil
	}
	// A VM's elements come and go together.
	guests, err := conn.GetSetElements(set(ipv4().guests))
	if err != nil {
		return fmt.Errorf("list the guests in nftables: %w", err)
	}
	if !slices.ContainsFunc(guests, func(e nftables.SetElement) bool { return slices.Equal(e.Key, c.Guest.AsSlice()) }) {
		return nil
	}
	all, err := listElements(conn)
	if err != nil {
		return err
	}
	return removeElements(conn, slices.DeleteFunc(all, func(e element) bool {
		of := slices.Equal(e.Key, c.Guest.AsSlice()) || slices.Equal(e.Key, c.Guest6.AsSlice()) || bytes.HasPrefix(e.Key, ifname(c.TAP))
		return !of
	}))
}

// addPort adds a VM's own chain to a transaction, for all frames that come in by its
// interface, if there is anything for it to do: to drop what is beyond the guest's rate, and
// on a bridge, what has another sender.
func addPort(conn *nftables.Conn, c network.Config) error {
	var rules []match
	if c.Mode == network.Bridge {
		mac, err := net.ParseMAC(c.GuestMAC)
		if err != nil || len(mac) != macLength {
			return fmt.Errorf("MAC address %q of the guest is not valid", c.GuestMAC)
		}
		sender := &expr.Payload{DestRegister: first, Base: expr.PayloadBaseLLHeader, Offset: macLength, Len: macLength}
		rules = append(rules, rule(match{sender, compare(expr.CmpOpNeq, mac)}, drop()))
	}
	if c.Rate.FromGuest != 0 {
		// The kernel lets what passes in a second, and the burst, pass at once.
		limit := &expr.Limit{
			Type: expr.LimitTypePktBytes, Rate: c.Rate.FromGuest / bitsPerByte, Unit: expr.LimitTimeSecond, Burst: minBurst, Over: true,
		}
		rules = append(rules, rule(match{limit}, drop()))
	}
	if len(rules) == 0 {
		return nil
	}
	added := conn.AddChain(&nftables.Chain{
		Name: portPrefix + c.TAP, Table: table(), Type: nftables.ChainTypeFilter, Device: c.TAP,
		Hooknum: nftables.ChainHookRef(hookIngress), Priority: nftables.ChainPriorityFilter,
	})
	conn.FlushChain(added)
	for _, r := range rules {
		conn.AddRule(&nftables.Rule{Table: table(), Chain: added, Exprs: r})
	}
	return nil
}

// hookIngress is where frames come in by an interface (NF_INET_INGRESS), in the family inet.
const hookIngress = 5

// macLength is how long a hardware address of Ethernet is, in bytes.
const macLength = 6

// removeElements adds the removal of elements to a transaction.
func removeElements(conn *nftables.Conn, elements []element) error {
	for _, e := range elements {
		if err := conn.SetDeleteElements(set(e.set), []nftables.SetElement{{Key: e.Key}}); err != nil {
			return err
		}
	}
	return nil
}

// listElements returns the elements of all VMs.
func listElements(conn *nftables.Conn) ([]element, error) {
	var all []element
	for _, s := range perGuest() {
		elements, err := conn.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("list the elements of set %s of nftables: %w", s.Name, err)
		}
		for _, e := range elements {
			all = append(all, element{s.Name, e})
		}
	}
	return all, nil
}

// isGone reports whether an error of a transaction says that something is not there.
func isGone(err error) bool { return errors.Is(err, unix.ENOENT) }
