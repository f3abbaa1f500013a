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
	"github.com/google/nftables/binaryutil"
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
	layout = 2
	// layoutPrefix and the number are the name of an empty chain.
	layoutPrefix = "layout-"
	// carryLayout and carryPrefix are the same of [carryChains].
	carryLayout = 1
	carryPrefix = "carry-"
	// openSet has the interfaces of guests that may reach each other.
	openSet = "open"
	// namedSet has the interfaces at which the gateway answers questions for names.
	namedSet = "named"
	// portPrefix and the name of its interface are the name of a VM's own chain; see
	// [addPort].
	portPrefix = "port-"
	// restrictedSet has the interfaces of guests that have an egress policy: none of their
	// packets is forwarded to the outside.
	restrictedSet = "restricted"
	// carriedMap leads from the interfaces of guests whose flows the VM's shim carries to the
	// port at which it takes them.
	carriedMap = "carried"
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
		{Table: t, Name: restrictedSet, KeyType: nftables.TypeIFName},
		{Table: t, Name: carriedMap, KeyType: nftables.TypeIFName, IsMap: true, DataType: nftables.TypeInetService},
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
	addChains(conn, chains())
	for _, c := range s.ours() {
		if strings.HasPrefix(c.Name, layoutPrefix) {
			conn.DelChain(c)
		}
	}
	conn.AddChain(&nftables.Chain{Name: fmt.Sprint(layoutPrefix, layout), Table: table()})
	return nil
}

// ensureCarrying adds to a transaction what is missing of [carryChains].
func (s state) ensureCarrying(conn *nftables.Conn) {
	marker := fmt.Sprint(carryPrefix, carryLayout)
	ours := s.ours()
	if slices.ContainsFunc(ours, func(c *nftables.Chain) bool { return c.Name == marker }) {
		return
	}
	addChains(conn, carryChains())
	for _, c := range ours {
		if strings.HasPrefix(c.Name, carryPrefix) {
			conn.DelChain(c)
		}
	}
	conn.AddChain(&nftables.Chain{Name: marker, Table: table()})
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

// offers are what a VM's shim has for its guest on the host, beside the guest's addresses.
type offers struct {
	// names reports that the gateway answers questions for names.
	names bool
	// restricted reports that no packet of the guest may be forwarded to the outside.
	restricted bool
	// carrier is the port at which the shim takes the guest's flows; 0: it takes none.
	carrier uint16
}

// elementsOf returns the elements of a VM.
func elementsOf(c network.Config, owner Owner, has offers) []element {
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
	if has.names {
		add(namedSet, tap)
	}
	if has.restricted {
		add(restrictedSet, tap)
	}
	if has.carrier != 0 {
		add(carriedMap, tap)
		all[len(all)-1].Val = binaryutil.BigEndian.PutUint16(has.carrier)
	}
	return all
}

// addElements adds elements to a transaction.
func addElements(conn *nftables.Conn, elements []element) error {
	for _, e := range elements {
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
