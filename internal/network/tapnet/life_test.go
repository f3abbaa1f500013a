package tapnet

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
)

// deadOwner returns an owner whose process has ended.
func deadOwner(t testing.TB, vm string) Owner {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	must(t, cmd.Run())
	return Owner{VM: vm, Directory: "gone", PID: cmd.Process.Pid, Start: 1}
}

// What a killed process has left is found by nothing but the host itself, and removed; what
// lives stays.
func TestReconcile(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	living := newNetwork(t, 2, nil)
	g := newGuest(t, living)
	abandon := func(lease int, change func(*network.Config)) Owner {
		config, _ := planned(t, lease, change)
		owner := deadOwner(t, fmt.Sprint("dead", lease))
		_, err := New(t.Context(), config, owner)
		must(t, err)
		return owner
	}
	bounded := func(c *network.Config) { c.Rate.FromGuest, c.OpenToVMs = 1_000_000, true }
	dead := []Owner{abandon(3, nil), abandon(4, bounded), abandon(6, onlyFar(t))}
	// Of one, only a part is left.
	dead = slices.Insert(dead, 2, abandon(5, nil))
	link, err := netlink.LinkByName("smol-ac100005")
	must(t, err)
	must(t, netlink.LinkDel(link))
	// An interface that is not smolvm's looks like one.
	stranger := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "smol-stranger"}}
	must(t, netlink.LinkAdd(stranger))
	must(t, netlink.LinkSetAlias(stranger, "mine"))

	removed, err := Reconcile(t.Context(), nil)
	must(t, err)
	slices.SortFunc(removed, func(a, b Owner) int { return strings.Compare(a.VM, b.VM) })
	if !slices.Equal(removed, dead) {
		t.Errorf("what was removed belonged to %v, want %v", removed, dead)
	}
	if removed, err = Reconcile(t.Context(), nil); err != nil || len(removed) > 0 {
		t.Errorf("a second time: %v, %v", removed, err)
	}
	mustReach(t, g, "tcp", farAddr, hostAddr)
	if _, err := netlink.LinkByName("smol-stranger"); err != nil {
		t.Errorf("an interface of somebody else: %v", err)
	}
	// Whoever is said to be dead is, though the process is there; and then nothing is left.
	removed, err = Reconcile(t.Context(), func(Owner) bool { return false })
	if err != nil || len(removed) != 1 || removed[0] != living.owner {
		t.Errorf("what belongs to one that is said to be dead: %v, %v", removed, err)
	}
	mustBeEmpty(t)
	must(t, living.Close())
}

// A VM is connected again at once, whatever is in its place and left by whom.
func TestClaim(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	t.Run("again and again", func(t *testing.T) {
		for range 10 {
			n := newNetwork(t, 2, func(c *network.Config) { c.Rate.FromGuest = 1_000_000 })
			// As a VMM does that has not ended yet.
			file, err := nettest.OpenTAP(n.Link().TAP)
			must(t, err)
			defer func() { _ = file.Close() }()
			must(t, n.Close())
		}
		mustBeEmpty(t)
	})
	t.Run("after a dead owner, whose VMM holds the interface", func(t *testing.T) {
		config, _ := planned(t, 3, func(c *network.Config) {
			c.Rate.FromGuest, c.OpenToVMs, c.Metadata = MinRate, true, []netip.Addr{netip.MustParseAddr(metadataAddr)}
		})
		_, err := New(t.Context(), config, deadOwner(t, "dead"))
		must(t, err)
		file, err := nettest.OpenTAP(config.TAP)
		must(t, err)
		defer func() { _ = file.Close() }()
		n := newNetwork(t, 3, nil)
		g := newGuest(t, n)
		if left := leftOnHost(t); slices.Contains(left, "chain port-"+config.TAP) {
			t.Error("the dead owner's rate is kept")
		}
		if removed, err := Reconcile(t.Context(), nil); err != nil || len(removed) > 0 {
			t.Errorf("belongs to a dead owner still: %v, %v", removed, err)
		}
		mustReach(t, g, "tcp", farAddr, hostAddr)
		mustNotReach(t, g, "udp", metadataAddr)
		must(t, n.Close())
		mustBeEmpty(t)
	})
	t.Run("after a dead owner with a policy", func(t *testing.T) {
		config, _ := planned(t, 6, onlyFar(t))
		_, err := New(t.Context(), config, deadOwner(t, "dead"))
		must(t, err)
		g := newGuest(t, newNetwork(t, 6, nil))
		mustReach(t, g, "udp", outsideAddr, hostAddr)
		if !ping(g, farAddr, patience) {
			t.Errorf("%s does not answer", farAddr)
		}
	})
	t.Run("not in place of one that lives", func(t *testing.T) {
		n := newNetwork(t, 4, nil)
		owner := n.owner
		owner.VM = "other"
		_, err := New(t.Context(), n.config, owner)
		mustFail(t, err, "is in use by VM vm4 of data directory data", true)
		mustReach(t, newGuest(t, n), "tcp", farAddr, hostAddr)
	})
	t.Run("not in place of what is not smolvm's", func(t *testing.T) {
		stranger := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "smol-ac100005"}}
		must(t, netlink.LinkAdd(stranger))
		defer func() { _ = netlink.LinkDel(stranger) }()
		config, owner := planned(t, 5, nil)
		_, err := New(t.Context(), config, owner)
		mustFail(t, err, "there is an interface smol-ac100005 already, which is not smolvm's", true)
	})
}

// mustFail checks an error's text, and whether it has a hint.
func mustFail(t testing.TB, err error, text string, hint bool) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) || (smolvm.HintOf(err) != "") != hint {
		t.Errorf("%v (hint %q), want %q", err, smolvm.HintOf(err), text)
	}
}

func TestBadInput(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	bridge := func(name string) func(*network.Config) {
		return func(c *network.Config) { c.Mode, c.Bridge = network.Bridge, name }
	}
	for _, test := range []struct {
		what   string
		change func(*network.Config)
		text   string
		hint   bool
	}{
		{"a bridge that is not there", bridge("br-none"), `there is no interface "br-none"`, true},
		{"a bridge that is none", bridge("up0"), "interface up0 is no bridge, but of type veth", true},
		{"a mode of another package", func(c *network.Config) { c.Mode = smolvm.NetworkUser }, `mode "user" is none with a TAP`, false},
		{"a name that is too long", func(c *network.Config) { c.TAP = "smol-1234567890123" }, "is no name for the interface", false},
		{"a name of others", func(c *network.Config) { c.TAP = "eth0" }, "is no name for the interface", false},
		{"a name that is a path", func(c *network.Config) { c.TAP = "smol-/../x" }, "is no name for the interface", false},
		{"an address that is not in the pool", func(c *network.Config) { c.Guest = netip.MustParseAddr("10.0.0.1") }, "10.0.0.1 is not in the pool", false},
		{"a rate that is too low", func(c *network.Config) { c.Rate.ToGuest = 7 }, "rate of 7 bits a second is too low", false},
		{"a pool that the host has a route into", func(c *network.Config) {
			c.Prefix, c.Guest, c.Gateway = netip.MustParsePrefix("198.51.0.0/16"), netip.MustParseAddr("198.51.0.2"), netip.MustParseAddr("198.51.0.1")
		}, "198.51.0.0/16 overlaps 198.51.100.0/24, to which the host has a route by interface up0", true},
	} {
		t.Run(test.what, func(t *testing.T) {
			config, owner := planned(t, 2, test.change)
			_, err := New(t.Context(), config, owner)
			mustFail(t, err, test.text, test.hint)
			mustBeEmpty(t)
		})
	}
	t.Run("an owner that can't be written down", func(t *testing.T) {
		config, owner := planned(t, 2, nil)
		for _, vm := range []string{"", "a b", "a@b", strings.Repeat("x", 200)} {
			owner.VM = vm
			_, err := New(t.Context(), config, owner)
			mustFail(t, err, "is no owner of a network", false)
		}
		mustBeEmpty(t)
	})
	t.Run("a route that comes later", func(t *testing.T) {
		newNetwork(t, 2, nil)
		must(t, nettest.Route("172.16.1.0/24", outsideAddr, ""))
		defer func() { must(t, netlink.RouteDel(&netlink.Route{Dst: single24("172.16.1.0")})) }()
		config, owner := planned(t, 300, nil)
		_, err := New(t.Context(), config, owner)
		mustFail(t, err, "172.16.0.0/16 overlaps 172.16.1.0/24, to which the host has a route by interface up0", true)
		if !errors.Is(err, ErrPoolCollides) {
			t.Errorf("%v, want %v", err, ErrPoolCollides)
		}
	})
}

func TestChoosePool(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	prefix := netip.MustParsePrefix
	choose := func(asked netip.Prefix, want string) {
		t.Helper()
		if pool, err := ChoosePool(asked, "data"); err != nil || pool != prefix(want) {
			t.Errorf("asked for %s: %s, %v; want %s", asked, pool, err, want)
		}
	}
	choose(netip.Prefix{}, "172.16.0.0/16")
	choose(prefix("10.9.0.0/20"), "10.9.0.0/20")
	newNetwork(t, 2, nil)
	choose(netip.Prefix{}, "172.16.0.0/16") // its own VMs do not count
	if pool, err := ChoosePool(netip.Prefix{}, "other"); err != nil || pool != prefix("172.31.0.0/16") {
		t.Errorf("beside another data directory: %s, %v", pool, err)
	}
	must(t, nettest.Route("172.16.0.0/12", outsideAddr, ""))
	choose(netip.Prefix{}, "10.200.0.0/16")
	_, err := ChoosePool(prefix("172.20.0.0/16"), "data")
	if !errors.Is(err, ErrPoolCollides) {
		t.Errorf("a pool that was asked for: %v, want %v", err, ErrPoolCollides)
	}
	mustFail(t, err, "172.20.0.0/16 overlaps 172.16.0.0/12", true)
	must(t, nettest.Route("10.0.0.0/8", outsideAddr, ""))
	if _, err := ChoosePool(netip.Prefix{}, "data"); !errors.Is(err, ErrPoolCollides) {
		t.Errorf("where none is left: %v, want %v", err, ErrPoolCollides)
	}
}

// Privileges that are lost before the network is removed: the error says what is left, and
// who has them removes it.
func TestPrivilegesLost(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	n := newNetwork(t, 2, nil)
	config, owner := planned(t, 3, nil)
	err := withoutPrivileges(t, func() error {
		_, err := New(t.Context(), config, owner)
		return err
	})
	mustFail(t, err, "operation not permitted", true)
	err = withoutPrivileges(t, n.Close)
	mustFail(t, err, "remove interface smol-ac100002: operation not permitted", true)
	if left := leftOnHost(t); !slices.Contains(left, "interface smol-ac100002") {
		t.Errorf("it is there no more: %q", left)
	}
	removed, err := Reconcile(t.Context(), func(Owner) bool { return false })
	if err != nil || len(removed) != 1 {
		t.Errorf("reconcile: %v, %v", removed, err)
	}
	mustBeEmpty(t)
	must(t, n.Close())
}

// withoutPrivileges runs f on a thread that has lost CAP_NET_ADMIN.
func withoutPrivileges(t testing.TB, f func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with it
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		err := unix.Capget(&header, &data[0])
		data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err = errors.Join(err, unix.Capset(&header, &data[0])); err != nil {
			t.Error("give up CAP_NET_ADMIN: ", err)
		}
		done <- f()
	}()
	return <-done
}

// The rules of an earlier layout are replaced under VMs that run, which go on.
func TestLayoutChanges(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	g := newGuest(t, newNetwork(t, 2, nil))
	conn, err := nftables.New()
	must(t, err)
	conn.DelChain(&nftables.Chain{Name: fmt.Sprint(layoutPrefix, layout), Table: table()})
	conn.AddChain(&nftables.Chain{Name: layoutPrefix + "0", Table: table()})
	conn.FlushChain(&nftables.Chain{Name: "forward", Table: table()})
	must(t, conn.Flush())
	newNetwork(t, 3, nil)
	mustReach(t, g, "tcp", farAddr, hostAddr)
	mustNotReach(t, g, "tcp", wireAddr)
	known, err := look(conn)
	must(t, err)
	for _, c := range known.ours() {
		if strings.HasPrefix(c.Name, layoutPrefix) && c.Name != fmt.Sprint(layoutPrefix, layout) {
			t.Errorf("chain %s is left", c.Name)
		}
	}
}

// The kernel knows no connection of a VM any more when its network is removed, and those of
// others still.
func TestConnectionsAreForgotten(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	n := newNetwork(t, 2, nil)
	one, other := newGuest(t, n), newGuest(t, newNetwork(t, 3, nil))
	for _, g := range []guest{one, other} {
		mustReach(t, g, "udp", farAddr, hostAddr)
		mustReach(t, g, "udp", farAddr6, hostAddr6)
	}
	count := func(g guest) (known int) {
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
			must(t, err)
			for _, flow := range flows {
				if from, ok := netip.AddrFromSlice(flow.Forward.SrcIP); ok && (from.Unmap() == g.config.Guest || from == g.config.Guest6) {
					known++
				}
			}
		}
		return known
	}
	if known := count(one); known < 2 {
		t.Fatalf("%d connections are known", known)
	}
	before := count(other)
	must(t, n.Close())
	if known := count(one); known > 0 {
		t.Errorf("%d connections of a VM are known that has no network any more", known)
	}
	if known := count(other); known != before {
		t.Errorf("of another VM %d connections are known, were %d", known, before)
	}
}

// The networks of many VMs cost no more each than those of few, and leave nothing.
func TestManyVMs(t *testing.T) {
	if testing.Short() {
		t.Skip("500 interfaces take some seconds")
	}
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	newNetwork(t, network.LastIndex, nil) // so the table stays
	perVM := func(count int) (made, removed time.Duration) {
		var all []*Network
		begin := time.Now()
		for i := range count {
			config, owner := planned(t, network.FirstIndex+i, nil)
			n, err := New(t.Context(), config, owner)
			must(t, err)
			all = append(all, n)
		}
		made = time.Since(begin) / time.Duration(count)
		begin = time.Now()
		for _, n := range all {
			must(t, n.Close())
		}
		return made, time.Since(begin) / time.Duration(count)
	}
	perVM(5) // for the first time
	fewMade, fewRemoved := perVM(5)
	manyMade, manyRemoved := perVM(500)
	t.Logf("per VM at 5: made in %v, removed in %v; at 500: %v and %v: in all %.2f times as long", fewMade, fewRemoved, manyMade, manyRemoved,
		float64(manyMade+manyRemoved)/float64(fewMade+fewRemoved))
	if left := leftOnHost(t); slices.ContainsFunc(left, func(name string) bool {
		return strings.HasPrefix(name, "interface ") && name != "interface smol-ac10fffe"
	}) {
		t.Errorf("left: %q", left)
	}
	conn, err := nftables.New()
	must(t, err)
	elements, err := listElements(conn)
	must(t, err)
	const perGuest = 7
	if len(elements) != perGuest {
		t.Errorf("%d elements are left, want the %d of the VM that stays", len(elements), perGuest)
	}
}

func TestOwner(t *testing.T) {
	t.Parallel()
	owner := Owner{VM: "vm-1", Directory: "0f3a", PID: 77, Start: 1234}
	if got, ok := parseOwner(owner.String()); !ok || got != owner {
		t.Errorf("parseOwner(%q) = %+v, %v", owner, got, ok)
	}
	for _, text := range []string{
		"", "smolvm:", "mine", "smolvm:vm@dir/7", "smolvm:vm@dir/x.1", "smolvm:vm@dir/7.-1", "smolvm:@dir/7.1", "smolvm:vm@/7.1",
		"smolvm:vm@dir/07.1", "smolvm:vm@dir/7.1 ", "smolvm:v m@dir/7.1", passMark,
	} {
		if got, ok := parseOwner(text); ok {
			t.Errorf("parseOwner(%q) = %+v", text, got)
		}
	}
	self, err := OwnedBy("dir", "vm")
	if err != nil || !self.Alive() || self.PID != os.Getpid() {
		t.Errorf("this process: %+v, %v", self, err)
	}
	if self.Start++; self.Alive() {
		t.Error("another process with the same number is taken for the owner's")
	}
}
