package network

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/smolvm/smolvm"
)

func modes() []smolvm.NetworkMode { return []smolvm.NetworkMode{smolvm.NetworkUser, TAP, Bridge} }

func TestPlan(t *testing.T) {
	t.Parallel()
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	user := func(lease int, mac string, cid uint32) Addresses {
		return Addresses{
			Mode: smolvm.NetworkUser, Lease: lease, Guest: addr("10.0.2.15"), Gateway: addr("10.0.2.2"), DNS: addr("10.0.2.2"),
			Prefix: prefix("10.0.2.0/24"), MAC: mac, CID: cid,
			Guest6: addr("fd73:6d6f:6c76:0:100::2"), Gateway6: addr("fd73:6d6f:6c76:0:100::1"), Prefix6: prefix("fd73:6d6f:6c76:0:100::/96"),
		}
	}
	tap := func(lease int, guest, guest6, mac, name string, cid uint32) Addresses {
		return Addresses{
			Mode: TAP, Lease: lease, Guest: addr(guest), Gateway: addr("172.16.0.1"), DNS: addr("172.16.0.1"),
			Prefix: prefix("172.16.0.0/16"), MAC: mac, TAP: name, CID: cid,
			Guest6: addr(guest6), Gateway6: addr("fd73:6d6f:6c76::ac10:1"), Prefix6: prefix("fd73:6d6f:6c76::ac10:0/112"),
		}
	}
	for _, test := range []struct {
		mode smolvm.NetworkMode
		want Addresses
	}{
		{"", user(FirstIndex, "02:00:ac:10:00:02", 3)},
		{smolvm.NetworkUser, user(FirstIndex, "02:00:ac:10:00:02", 3)},
		{smolvm.NetworkUser, user(PlaceholderIndex, "02:00:ac:10:00:01", 0)}, // CID 2 is the host's
		{smolvm.NetworkUser, user(LastIndex, "02:00:ac:10:ff:fe", 65535)},
		{TAP, tap(FirstIndex, "172.16.0.2", "fd73:6d6f:6c76::ac10:2", "02:00:ac:10:00:02", "smol-ac100002", 3)},
		{TAP, tap(255, "172.16.0.255", "fd73:6d6f:6c76::ac10:ff", "02:00:ac:10:00:ff", "smol-ac1000ff", 256)},
		{TAP, tap(256, "172.16.1.0", "fd73:6d6f:6c76::ac10:100", "02:00:ac:10:01:00", "smol-ac100100", 257)},
		{smolvm.NetworkNone, Addresses{Mode: smolvm.NetworkNone, Lease: 7, CID: 8}},
		{Bridge, Addresses{Mode: Bridge, Lease: 300, MAC: "02:00:ac:10:01:2c", TAP: "smol-ac10012c", CID: 301}},
		{TAP, tap(LastIndex, "172.16.255.254", "fd73:6d6f:6c76::ac10:fffe", "02:00:ac:10:ff:fe", "smol-ac10fffe", 65535)},
	} {
		if got, err := Plan(test.mode, test.want.Lease); err != nil || got != test.want {
			t.Errorf("Plan(%q, %d) = %+v, %v; want %+v", test.mode, test.want.Lease, got, err, test.want)
		}
	}
}

func TestPlanRefuses(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		mode        smolvm.NetworkMode
		lease       int
		text        string
		unsupported bool
	}{
		{"carrier-pigeon", 7, `mode "carrier-pigeon" is not known`, true},
		{smolvm.NetworkUser, 0, "lease 0 is not one of 2 to 65534", false},
		{TAP, -1, "lease -1", false},
		{TAP, LastIndex + 1, "lease 65535", false},
		{TAP, PlaceholderIndex, "no address in the pool 172.16.0.0/16", false}, // it would be the host's
	} {
		got, err := Plan(test.mode, test.lease)
		if err == nil || !strings.Contains(err.Error(), test.text) || errors.Is(err, smolvm.ErrUnsupported) != test.unsupported {
			t.Errorf("Plan(%q, %d): %v", test.mode, test.lease, err)
		}
		if want := (Addresses{Mode: test.mode, Lease: test.lease}); got != want {
			t.Errorf("Plan(%q, %d) = %+v with the error, want %+v", test.mode, test.lease, got, want)
		}
	}
}

// A pool gives as many VMs addresses as it has, and all that they share with others is another
// pool's.
func TestPlanIn(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		pool        string
		lease       int
		guest, want string // the guest's address, or the error's text
	}{
		{"10.200.0.0/16", 300, "10.200.1.44", ""},
		{"192.168.7.0/29", FirstIndex, "192.168.7.2", ""},
		{"192.168.7.0/29", 6, "192.168.7.6", ""},
		{"192.168.7.0/29", 7, "", "lease 7 has no address in 192.168.7.0/29, which has room for 5 VMs"},
		{"10.0.0.0/8", LastIndex, "10.0.255.254", ""},
		{"192.168.7.0/30", FirstIndex, "", "is too small"},
		{"8.0.0.0/7", FirstIndex, "", "is too large"},
		{"10.200.0.1/16", FirstIndex, "", "write 10.200.0.0/16"},
		{"fd00::/64", FirstIndex, "", "is no network of IPv4"},
		{"127.0.0.0/16", FirstIndex, "", "has no addresses of hosts"},
		{"169.254.0.0/16", FirstIndex, "", "has no addresses of hosts"},
		{"0.0.0.0/8", FirstIndex, "", "has no addresses of hosts"},
	} {
		pool := netip.MustParsePrefix(test.pool)
		a, err := PlanIn(pool, TAP, test.lease)
		switch {
		case test.want != "":
			if err == nil || !strings.Contains(err.Error(), test.want) || errors.Is(err, ErrPoolExhausted) != (test.lease == 7) {
				t.Errorf("lease %d of %s: %v, want %q", test.lease, test.pool, err, test.want)
			}
		case err != nil || a.Guest.String() != test.guest || a.Prefix != pool:
			t.Errorf("lease %d of %s: %+v, %v; want %s", test.lease, test.pool, a, err, test.guest)
		default:
			other, err := Plan(TAP, test.lease)
			if err != nil || a.TAP == other.TAP || a.Guest6 == other.Guest6 || a.Prefix6.Overlaps(other.Prefix6) || a.MAC != other.MAC {
				t.Errorf("lease %d of %s is %+v, and of the default pool %+v", test.lease, test.pool, a, other)
			}
		}
	}
	if _, err := PlanIn(netip.Prefix{}, TAP, FirstIndex); err == nil {
		t.Error("no pool is one")
	}
}

// What users see and what the shim is told is the plan, and nothing but it.
func TestPlanForms(t *testing.T) {
	t.Parallel()
	for _, mode := range modes() {
		a, err := Plan(mode, 300)
		if err != nil {
			t.Fatal(err)
		}
		public, config := a.Public(), a.Config()
		if public.Mode != mode || public.GuestIP != a.Guest || public.Gateway != a.Gateway || public.Prefix != a.Prefix ||
			public.GuestMAC != a.MAC || public.SSHHostPort != 0 || public.PortForwards != nil {
			t.Errorf("%s: users see %+v of %+v", mode, public, a)
		}
		if config.UsedMode() != mode || config.Guest != a.Guest || config.Gateway != a.Gateway || config.Prefix != a.Prefix ||
			config.GuestMAC != a.MAC || config.TAP != a.TAP || config.Guest6 != a.Guest6 || config.Gateway6 != a.Gateway6 ||
			config.Prefix6 != a.Prefix6 || config.Metadata != nil || config.MTU != 0 {
			t.Errorf("%s: the shim is told %+v of %+v", mode, config, a)
		}
	}
}

// No two leases share what others of the host or its network could see, whatever the modes of
// the two VMs. Addresses of the mode user are seen by the VM alone.
func TestNoTwoLeasesShareAnything(t *testing.T) {
	t.Parallel()
	index, mode := rapid.IntRange(PlaceholderIndex, LastIndex), rapid.SampledFrom(modes())
	rapid.Check(t, func(t *rapid.T) {
		a, errA := Plan(mode.Draw(t, "mode of a"), index.Draw(t, "a"))
		b, errB := Plan(mode.Draw(t, "mode of b"), index.Draw(t, "b"))
		if errA != nil || errB != nil || a.Lease == b.Lease {
			t.Skip("not two leases")
		}
		switch {
		case a.MAC == b.MAC, a.CID == b.CID && a.CID != 0, a.TAP == b.TAP && a.TAP != "",
			a.Mode == TAP && b.Mode == TAP && a.Guest == b.Guest:
			t.Fatalf("%+v and %+v share something", a, b)
		}
	})
}

// TestPlanRoundTrip finds the lease in everything that is derived from it, for every lease
// there is, and everything where it belongs.
func TestPlanRoundTrip(t *testing.T) {
	t.Parallel()
	for lease := FirstIndex; lease <= LastIndex; lease++ {
		a, err := Plan(TAP, lease)
		if err != nil {
			t.Fatal(err)
		}
		if bytes := a.Guest.As4(); !a.Prefix.Contains(a.Guest) || int(bytes[2])<<8|int(bytes[3]) != lease {
			t.Fatalf("lease %d: guest %s", lease, a.Guest)
		}
		if a.Prefix != netip.MustParsePrefix("172.16.0.0/16") || a.Guest == a.Gateway || a.Guest == a.Prefix.Addr() {
			t.Fatalf("lease %d: guest %s is the network's or the host's", lease, a.Guest)
		}
		mac, err := net.ParseMAC(a.MAC)
		if err != nil || len(mac) != 6 || int(mac[4])<<8|int(mac[5]) != lease {
			t.Fatalf("lease %d: MAC %s: %v", lease, a.MAC, err)
		}
		if local, group := mac[0]&2 != 0, mac[0]&1 != 0; !local || group {
			t.Fatalf("lease %d: MAC %s is no locally administered address of one interface", lease, a.MAC)
		}
		if n, err := strconv.ParseUint(strings.TrimPrefix(a.TAP, "smol-ac10"), 16, 16); err != nil || int(n) != lease || len(a.TAP) > 15 {
			t.Fatalf("lease %d: TAP %s: %v", lease, a.TAP, err)
		}
		if a.CID < 3 || int(a.CID)-1 != lease {
			t.Fatalf("lease %d: CID %d", lease, a.CID)
		}
		user, err := Plan(smolvm.NetworkUser, lease)
		if err != nil || user.MAC != a.MAC || user.CID != a.CID || user.TAP != "" || !user.Prefix.Contains(user.Guest) || !user.Prefix.Contains(user.Gateway) {
			t.Fatalf("lease %d: in mode user %+v, %v; on TAP %+v", lease, user, err, a)
		}
	}
}

// An interface that stands by has a name that no VM's can have.
func TestStandby(t *testing.T) {
	t.Parallel()
	for _, run := range []string{"", "a", "0123456789abcdef"} {
		config := Standby(run)
		if !config.IsStandby() || !strings.HasPrefix(config.TAP, TAPPrefix) || len(config.TAP) > 15 || config.Mode != TAP || config.Guest.IsValid() {
			t.Errorf("run %q: %+v", run, config)
		}
	}
	if a, b := Standby("0123456789abcdef"), Standby("1123456789abcdef"); a.TAP == b.TAP {
		t.Errorf("two of them have the name %s", a.TAP)
	}
	for _, mode := range modes() {
		at, err := Plan(mode, LastIndex)
		if err != nil || at.Config().IsStandby() {
			t.Errorf("a VM in mode %s stands by, %v", mode, err)
		}
	}
}
