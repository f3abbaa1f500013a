package network

import (
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/smolvm/smolvm"
)

func TestDerived(t *testing.T) {
	t.Parallel()
	tests := []struct {
		index        int
		ip, mac, tap string
		cid          uint32
	}{
		{FirstIndex, "172.16.0.2", "02:00:ac:10:00:02", "smol2", 3},
		{255, "172.16.0.255", "02:00:ac:10:00:ff", "smol255", 256},
		{256, "172.16.1.0", "02:00:ac:10:01:00", "smol256", 257},
		{LastIndex, "172.16.255.254", "02:00:ac:10:ff:fe", "smol65534", 65535},
	}
	for _, test := range tests {
		if got := GuestIP(test.index).String(); got != test.ip {
			t.Errorf("GuestIP(%d) = %s, want %s", test.index, got, test.ip)
		}
		if got := MAC(test.index); got != test.mac {
			t.Errorf("MAC(%d) = %s, want %s", test.index, got, test.mac)
		}
		if got := TAPName(test.index); got != test.tap {
			t.Errorf("TAPName(%d) = %s, want %s", test.index, got, test.tap)
		}
		if got := CID(test.index); got != test.cid {
			t.Errorf("CID(%d) = %d, want %d", test.index, got, test.cid)
		}
	}
}

func TestUser(t *testing.T) {
	t.Parallel()
	plan := User(FirstIndex)
	if plan.Mode != smolvm.NetworkUser || plan.Prefix.String() != "10.0.2.0/24" ||
		plan.Gateway.String() != "10.0.2.2" || plan.GuestIP.String() != "10.0.2.15" {
		t.Errorf("plan = %+v, want QEMU's user network", plan)
	}
	if plan.GuestMAC != MAC(FirstIndex) {
		t.Errorf("MAC = %s, want the same as in any other mode, %s", plan.GuestMAC, MAC(FirstIndex))
	}
}

func TestNoTwoIndexesShareAnything(t *testing.T) {
	t.Parallel()
	index := rapid.IntRange(FirstIndex, LastIndex)
	rapid.Check(t, func(t *rapid.T) {
		a, b := index.Draw(t, "a"), index.Draw(t, "b")
		same := a == b
		if (GuestIP(a) == GuestIP(b)) != same || (MAC(a) == MAC(b)) != same ||
			(TAPName(a) == TAPName(b)) != same || (CID(a) == CID(b)) != same {
			t.Fatalf("indexes %d and %d share something", a, b)
		}
	})
}

// TestRoundTrip finds the index in everything that is derived from it, for every
// index there is.
func TestRoundTrip(t *testing.T) {
	t.Parallel()
	guests := netip.MustParsePrefix("172.16.0.0/16")
	for index := FirstIndex; index <= LastIndex; index++ {
		ip := GuestIP(index)
		if bytes := ip.As4(); !guests.Contains(ip) || int(bytes[2])<<8|int(bytes[3]) != index {
			t.Fatalf("GuestIP(%d) = %s", index, ip)
		}
		mac, err := net.ParseMAC(MAC(index))
		if err != nil || len(mac) != 6 || int(mac[4])<<8|int(mac[5]) != index {
			t.Fatalf("MAC(%d) = %s: %v", index, mac, err)
		}
		if local, group := mac[0]&2 != 0, mac[0]&1 != 0; !local || group {
			t.Fatalf("MAC(%d) = %s, want a locally administered address of one interface", index, mac)
		}
		name := TAPName(index)
		if n, err := strconv.Atoi(strings.TrimPrefix(name, "smol")); err != nil || n != index || len(name) > 15 {
			t.Fatalf("TAPName(%d) = %s: %v", index, name, err)
		}
		if cid := CID(index); cid < 3 || int(cid)-1 != index {
			t.Fatalf("CID(%d) = %d", index, cid)
		}
	}
}
