package outbound

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

// What is remembered of a guest's questions has an end, in time and in memory.
func TestNames(t *testing.T) {
	now := time.Unix(1e9, 0)
	a := &Names{}
	a.SetClock(func() time.Time { return now })
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}) }
	a.Add(addr(1), "One.example.", time.Minute)
	a.Add(addr(1), "one.example", time.Second)
	a.Add(addr(1), "two.example", 1000*time.Hour)
	for _, test := range []struct {
		after time.Duration
		want  int
	}{{0, 2}, {time.Minute + AskedGrace - 1, 2}, {1, 1}, {maxTTL, 0}} {
		now = now.Add(test.after)
		if got := a.Of(addr(1)); len(got) != test.want {
			t.Errorf("after %s more: %q, want %d", test.after, got, test.want)
		}
	}
	for i := range 3 * maxAsked {
		a.Add(addr(i), fmt.Sprint("name", i), time.Hour)
		if a.count > maxAsked || len(a.addrs) > maxAsked {
			t.Fatalf("%d names of %d addresses", a.count, len(a.addrs))
		}
		if len(a.Of(addr(i))) == 0 {
			t.Fatal("a name that was asked just now is not remembered")
		}
	}
	for i := range 2 * maxNamesOf {
		a.Add(addr(70), fmt.Sprint("name", i), time.Hour)
	}
	if got := a.Of(addr(70)); len(got) != maxNamesOf {
		t.Errorf("%d names of one address, want %d", len(got), maxNamesOf)
	}
	count := 0
	for _, names := range a.addrs {
		count += len(names)
	}
	if count != a.count {
		t.Errorf("%d names are counted as %d", count, a.count)
	}
}
