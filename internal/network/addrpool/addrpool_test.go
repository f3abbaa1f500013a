package addrpool_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/addrpool"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/tapnet"
)

// A data directory has one pool, which is chosen once, and another if the host has got a route
// into that. Those that are asked for do not overlap it, nor each other, as long as VMs use them.
func TestTake(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	dir := t.TempDir()
	var used []netip.Prefix
	book := addrpool.Book{
		Path: filepath.Join(dir, "networks.json"), Lock: filepath.Join(dir, "lock"), Directory: "d",
		InUse: func(context.Context) ([]netip.Prefix, error) { return used, nil },
	}
	pool := func(text string) netip.Prefix {
		if text == "" {
			return netip.Prefix{}
		}
		return netip.MustParsePrefix(text)
	}
	take := func(asked, want string) {
		t.Helper()
		got, err := book.Take(t.Context(), pool(asked))
		if err != nil || got != pool(want) {
			t.Errorf("asked for %q: %s, %v, want %s", asked, got, err, want)
		}
		used = append(used, got)
	}
	refuse := func(asked, why string) {
		t.Helper()
		if got, err := book.Take(t.Context(), pool(asked)); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("asked for %q: %s, %v, want an error with %q", asked, got, err, why)
		} else if smolvm.HintOf(err) == "" && !strings.Contains(why, "small") {
			t.Errorf("no hint: %v", err)
		}
	}
	take("10.77.0.0/24", "10.77.0.0/24")
	take("", network.DefaultPool().String())
	take("", network.DefaultPool().String())
	take("10.77.0.0/24", "10.77.0.0/24")
	refuse("10.77.0.0/16", "overlaps pool 10.77.0.0/24")
	refuse("172.16.3.0/24", "overlaps pool 172.16.0.0/16")
	refuse("10.78.0.0/30", "too small")

	before, err := os.ReadFile(book.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vpn0"}, PeerName: "vpn1"}); err != nil {
		t.Fatal(err)
	}
	if err := nettest.Configure("vpn0", "172.16.5.1/24"); err != nil {
		t.Fatal(err)
	}
	if _, err := book.Take(t.Context(), network.DefaultPool()); !errors.Is(err, tapnet.ErrPoolCollides) {
		t.Errorf("a pool that the host has a route into: %v", err)
	}
	take("", "172.31.0.0/16")
	take("", "172.31.0.0/16")
	if after, err := os.ReadFile(book.Path); err != nil || string(after) == string(before) {
		t.Errorf("the pools are %s, %v", after, err)
	}
	used = nil
	take("10.77.0.0/16", "10.77.0.0/16") // nobody has the smaller one any more

	if err := os.WriteFile(book.Path, []byte(`{"format": 99}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := book.Take(t.Context(), netip.Prefix{}); !errors.Is(err, smolvm.ErrUnsupported) {
		t.Errorf("pools of a newer program: %v", err)
	}
}
