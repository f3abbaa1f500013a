package manager_test

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/tapnet"
)

// withoutNetAdmin runs f in a thread without the privilege to change networks.
func withoutNetAdmin(f func()) error {
	return nettest.OnThread(func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			return err
		}
		data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err := unix.Capset(&header, &data[0]); err != nil {
			return err
		}
		f()
		return nil
	})
}

// What can't be had on a host is refused before anything is made, with what to do instead.
func TestNetworkRefused(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("there are no TAP interfaces: ", err)
	}
	m := openEmpty(t)
	create := func(id string, n smolvm.Network, egress *smolvm.EgressPolicy) error {
		config := withoutImage(t, id)
		config.Network, config.Egress = n, egress
		_, err := m.Create(t.Context(), config, smolvm.CreateOptions{})
		return err
	}
	small := smolvm.Network{Mode: smolvm.NetworkTAP, Pool: netip.MustParsePrefix("10.77.0.0/29")}
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		ensure(t, create(id, small, nil))
	}
	first := mustGet(t, m, "a").Network
	if first.GuestIP.String() != "10.77.0.2" || first.Gateway.String() != "10.77.0.1" || first.TAP != "smol-0a4d0002" || first.SSHHostPort == 0 {
		t.Errorf("the network of the first: %+v", first)
	}
	privileged := map[string]struct {
		network smolvm.Network
		egress  *smolvm.EgressPolicy
		is      error
		text    string
	}{
		"pool exhausted":   {network: small, is: network.ErrPoolExhausted, text: "10.77.0.0/29"},
		"overlapping pool": {network: smolvm.Network{Mode: smolvm.NetworkTAP, Pool: netip.MustParsePrefix("10.77.0.0/16")}, text: "overlaps pool 10.77.0.0/29"},
		"unknown bridge":   {network: smolvm.Network{Mode: smolvm.NetworkBridge, Bridge: "br9"}, text: `no interface "br9"`},
		"no bridge":        {network: smolvm.Network{Mode: smolvm.NetworkBridge, Bridge: "lo"}, text: "is no bridge"},
		"policy of none":   {network: smolvm.Network{Mode: smolvm.NetworkNone}, egress: &smolvm.EgressPolicy{}, is: smolvm.ErrUnsupported},
	}
	for name, test := range privileged {
		err := create("refused", test.network, test.egress)
		if err == nil || test.is != nil && !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.text) || smolvm.HintOf(err) == "" {
			t.Errorf("%s: %v (%s)", name, err, smolvm.HintOf(err))
		}
	}
	ensure(t, withoutNetAdmin(func() {
		err := create("refused", smolvm.Network{Mode: smolvm.NetworkTAP}, nil)
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(smolvm.HintOf(err), "mode user") {
			t.Errorf("without the privilege: %v (%s)", err, smolvm.HintOf(err))
		}
		ensure(t, create("user", smolvm.Network{}, nil))
		ensure(t, create("none", smolvm.Network{Mode: smolvm.NetworkNone}, nil))
		if _, err := m.Reconcile(t.Context()); err != nil {
			t.Errorf("Reconcile without the privilege, and with nothing to do: %v", err)
		}
	}))
	if _, err := m.Get(t.Context(), "refused"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("what was refused is there: %v", err)
	}
	if left := leftOnHost(t); left != nothingLeft {
		t.Errorf("left on the host: %s", left)
	}
}

// A deletion without the privilege says what it leaves on the host, and a later Reconcile with it
// removes that, with nothing but the host to go by.
func TestDeleteWithoutPrivilege(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("there are no TAP interfaces: ", err)
	}
	m := openEmpty(t)
	config := withoutImage(t, "vm")
	config.Network.Mode = smolvm.NetworkTAP
	mustCreate(t, m, config)
	at, err := network.Plan(smolvm.NetworkTAP, network.FirstIndex)
	ensure(t, err)
	// As a shim that was killed leaves it.
	owner := tapnet.Owner{VM: "vm", Directory: tapnet.DirectoryName(m.DataDir()), PID: 1 << 22, Start: 1}
	made, err := tapnet.New(t.Context(), at.Config(), owner)
	ensure(t, err)
	ensure(t, withoutNetAdmin(func() {
		err := m.Delete(t.Context(), "vm", smolvm.DeleteOptions{})
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), at.TAP) || !strings.Contains(smolvm.HintOf(err), "smolvm reconcile") {
			t.Errorf("Delete: %v (%s)", err, smolvm.HintOf(err))
		}
	}))
	if _, err := m.Get(t.Context(), "vm"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("the VM afterwards: %v", err)
	}
	if _, err := netlink.LinkByName(at.TAP); err != nil {
		t.Errorf("its interface: %v", err)
	}
	if _, err := m.Reconcile(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := netlink.LinkByName(at.TAP); !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("its interface after Reconcile: %v", err)
	}
	if left := leftOnHost(t); left != nothingLeft {
		t.Errorf("left on the host: %s", left)
	}
	_ = made.Close() // its name server
}
