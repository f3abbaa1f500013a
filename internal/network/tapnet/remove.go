package tapnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// Close implements [network.Attachment]. The error says what could not be removed from the
// host; another call tries again, and so does [Reconcile] when this process has ended.
func (n *Network) Close() error {
	n.open.Close()
	n.endNames()
	n.changing.Lock()
	defer n.changing.Unlock()
	n.endFlows()
	if n.removed {
		return nil
	}
	unlock, err := lockSoon()
	if err != nil {
		return fmt.Errorf("remove the network of VM %s: %w", n.owner.VM, err)
	}
	defer unlock()
	err = n.remove()
	n.endWatch()
	if err != nil {
		return &smolvm.Error{
			Hint: "what is left is removed when smolvm reconciles with the privileges that it takes (root or CAP_NET_ADMIN)",
			Err:  fmt.Errorf("remove the network of VM %s: %w", n.owner.VM, err),
		}
	}
	n.removed = true
	return nil
}

// undo takes back what was made of a network that could not be made as a whole.
func (n *Network) undo() error {
	n.endNames()
	n.endFlows()
	defer n.endWatch() // which hears of what is removed
	return n.remove()
}

// remove removes all of the network from the host.
func (n *Network) remove() error {
	tools, err := openTools()
	if err != nil {
		return err
	}
	defer tools.close()
	found := leavings{taps: []string{n.config.TAP}}
	link, err := ownTAP(tools.handle, n.config.TAP, n.owner)
	if err != nil {
		return err
	}
	if link != nil { // so the elements with its name are the owner's too
		found.links = []netlink.Link{link}
		found.elements = elementsOf(n.config, n.owner, n.has)
		if n.config.Mode == network.Bridge {
			found.elements = nil
		}
		if err := tools.remove(found); !isGone(err) {
			return err
		}
		found.links = nil
	} else {
		found.taps = nil // it may be another's by now
	}
	// Somebody else has removed a part of it.
	if found.elements, err = tools.elements(func(o Owner) bool { return o == n.owner }); err != nil {
		return err
	}
	return tools.remove(found)
}

// Reconcile removes from the host what belongs to owners that don't live: interfaces,
// elements of sets, and, if no VM is left, the table and the rules in others' chains. It
// needs no record but what stands with the objects themselves. Live reports which owners live;
// nil: those whose processes are there. It returns the owners of what was removed.
func Reconcile(ctx context.Context, live func(Owner) bool) ([]Owner, error) {
	if live == nil {
		live = Owner.Alive
	}
	unlock, err := lock(ctx)
	if err != nil {
		return nil, fmt.Errorf("reconcile the networks of VMs: %w", err)
	}
	defer unlock()
	tools, err := openTools()
	if err != nil {
		return nil, fmt.Errorf("reconcile the networks of VMs: %w", err)
	}
	defer tools.close()
	dead := func(o Owner) bool { return !live(o) }
	var found leavings
	if found.links, err = tools.links(dead); err == nil {
		found.elements, err = tools.elements(dead)
	}
	if err == nil {
		found.taps, err = tools.tapsWithout(live)
	}
	if err == nil {
		err = tools.remove(found)
	}
	if err != nil {
		return nil, fmt.Errorf("reconcile the networks of VMs: %w", withHint(err))
	}
	return found.owners(), nil
}

// leavings are objects of the host that nobody needs any more.
type leavings struct {
	links    []netlink.Link
	elements []element
	taps     []string // names of interfaces whose own chains are not needed any more
}

// owners returns whose they are, each once.
func (l leavings) owners() []Owner {
	var owners []Owner
	add := func(text string) {
		if o, ok := parseOwner(text); ok && !slices.Contains(owners, o) {
			owners = append(owners, o)
		}
	}
	for _, link := range l.links {
		add(link.Attrs().Alias)
	}
	for _, e := range l.elements {
		add(e.Comment)
	}
	return owners
}

// addrs returns the addresses of guests among them.
func (l leavings) addrs() []netip.Addr {
	var addrs []netip.Addr
	for _, e := range l.elements {
		if addr, ok := netip.AddrFromSlice(e.Key); ok && (e.set == ipv4().guests || e.set == ipv6().guests) {
			addrs = append(addrs, addr)
		}
	}
	return addrs
}

// tools are connections to the kernel.
type tools struct {
	handle *netlink.Handle
	conn   *nftables.Conn
}

func openTools() (tools, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		return tools{}, fmt.Errorf("open netlink: %w", err)
	}
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		handle.Close()
		return tools{}, fmt.Errorf("open nftables: %w", err)
	}
	return tools{handle, conn}, nil
}

func (t tools) close() {
	t.handle.Close()
	_ = t.conn.CloseLasting()
}

// links returns the interfaces whose owners are chosen.
func (t tools) links(chosen func(Owner) bool) ([]netlink.Link, error) {
	all, err := t.handle.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the host's interfaces: %w", err)
	}
	return slices.DeleteFunc(all, func(link netlink.Link) bool {
		at := link.Attrs()
		owner, ok := parseOwner(at.Alias)
		return !strings.HasPrefix(at.Name, network.TAPPrefix) || !ok || !chosen(owner)
	}), nil
}

// tapsWithout returns the names of the interfaces that have a chain of their own and that no
// owner lives for, whether they are there or not.
func (t tools) tapsWithout(live func(Owner) bool) ([]string, error) {
	known, err := look(t.conn)
	if err != nil {
		return nil, err
	}
	needed, err := t.links(live)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, c := range known.ours() {
		name, ok := strings.CutPrefix(c.Name, portPrefix)
		if ok && !slices.ContainsFunc(needed, func(link netlink.Link) bool { return link.Attrs().Name == name }) {
			names = append(names, name)
		}
	}
	return names, nil
}

// elements returns the elements whose owners are chosen, and those of which nobody knows whose
// they are.
func (t tools) elements(chosen func(Owner) bool) ([]element, error) {
	known, err := look(t.conn)
	if err != nil || len(known.ours()) == 0 {
		return nil, err
	}
	all, err := listElements(t.conn)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(e element) bool {
		owner, ok := parseOwner(e.Comment)
		return ok && !chosen(owner)
	}), nil
}

// remove removes objects from the host, and if no VM is left, all else that is smolvm's. The
// interfaces go first: while there is one, the table keeps its guest within its bounds.
func (t tools) remove(found leavings) error {
	var errs []error
	for _, link := range found.links {
		errs = append(errs, deleteLink(t.handle, link))
	}
	failed := errors.Join(errs...)
	known, err := look(t.conn)
	if err != nil {
		return errors.Join(failed, err)
	}
	last := failed == nil
	if last && len(known.ours()) > 0 {
		if last, err = known.isLast(t.conn, found); err != nil {
			return err
		}
	}
	if err := t.removeRules(known, found, last); err != nil {
		err = fmt.Errorf("remove the rules of nftables: %w", err)
		return errors.Join(failed, err)
	}
	if last {
		if err := undivert(t.handle); err != nil {
			return errors.Join(failed, err)
		}
	}
	t.forget(found.addrs(), netlink.ConntrackOrigSrcIP, netlink.ConntrackOrigDstIP)
	return failed
}

// removeRules removes elements and chains from nftables, or if no VM is left, all that is smolvm's there.
func (t tools) removeRules(known state, found leavings, last bool) error {
	hasTable := len(known.ours()) > 0
	switch {
	case last:
		passages, err := known.passages(t.conn)
		if err != nil {
			return err
		}
		if err := closePassages(t.conn, passages); err != nil {
			return err
		}
		if hasTable {
			t.conn.DelTable(table())
		}
	case hasTable:
		if err := removeElements(t.conn, found.elements); err != nil {
			return err
		}
		for _, c := range known.ours() {
			if name, ok := strings.CutPrefix(c.Name, portPrefix); ok && slices.Contains(found.taps, name) {
				t.conn.FlushChain(c)
				t.conn.DelChain(c)
			}
		}
	}
	return t.conn.Flush()
}

// isLast reports whether no VM is left in the table when something is removed.
func (s state) isLast(conn *nftables.Conn, without leavings) (bool, error) {
	if slices.ContainsFunc(s.ours(), func(c *nftables.Chain) bool {
		name, ok := strings.CutPrefix(c.Name, portPrefix)
		return ok && !slices.Contains(without.taps, name)
	}) {
		return false, nil
	}
	for _, v := range []version{ipv4(), ipv6()} {
		left, err := conn.GetSetElements(set(v.guests))
		if err != nil {
			return false, fmt.Errorf("list the guests in nftables: %w", err)
		}
		if slices.ContainsFunc(left, func(l nftables.SetElement) bool {
			return !slices.ContainsFunc(without.elements, func(e element) bool { return e.set == v.guests && slices.Equal(e.Key, l.Key) })
		}) {
			return false, nil
		}
	}
	return true, nil
}
