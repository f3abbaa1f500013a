package tap_test

import (
	"os"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/vmm/tap"
)

// The owner of a TAP interface is the one that was set last, and it can be opened still.
func TestSetOwner(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	if os.Getuid() != 0 {
		t.Skip("only root can give an interface to another user")
	}
	err := netlink.LinkAdd(&netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: "tap0"}, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, uid := range []int{12345, 54321} {
		if err := tap.SetOwner("tap0", uid); err != nil {
			t.Fatal(err)
		}
		link, err := netlink.LinkByName("tap0")
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := link.(*netlink.Tuntap); !ok || int(got.Owner) != uid {
			t.Errorf("the owner is %+v, want %d", link, uid)
		}
	}
	file, err := tap.Open("tap0")
	if err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Error(err)
	}
	if err := tap.SetOwner("tap1", 1); err == nil {
		t.Error("an interface that is not there was given to a user")
	}
}
