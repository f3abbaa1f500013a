package manager_test

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// Firecracker's guests on TAP interfaces of the host reach the outside, by name too, and not each
// other; they are reached at their own addresses, and an egress policy holds.
func TestTAPByFirecracker(t *testing.T) {
	testenv.RequireKVM(t)
	if !nettest.InOwnNetwork(t) {
		return
	}
	outside(t)
	config := useReal(t)
	config.Backend, config.Templates = "firecracker", manager.TemplateConfig{Disabled: true}
	m := openAt(t, config)
	var vms []smolvm.VMInfo
	for _, id := range []string{"a", "b"} {
		mustCreate(t, m, smolvm.VMConfig{ID: id, MemoryMiB: 256, Network: smolvm.Network{Mode: smolvm.NetworkTAP}})
		vm, err := m.Start(t.Context(), id, smolvm.StartOptions{Timeout: kvmBootTimeout})
		if err != nil {
			t.Fatal(err)
		}
		if vm.Backend != "firecracker" || len(vm.Start.Warnings) > 0 {
			t.Errorf("VM %s runs by %s, with warnings %q", id, vm.Backend, vm.Start.Warnings)
		}
		vms = append(vms, vm)
		if got := sh(t, m, id, fetchFrom(outsideAddr)); got != "from "+theHost {
			t.Errorf("the outside answers VM %s by %q", id, got)
		}
		if got := sh(t, m, id, "nslookup "+outsideName); !strings.Contains(got, outsideAddr) {
			t.Errorf("VM %s is told of %s: %q", id, outsideName, got)
		}
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(vm.Network.GuestIP.String(), "22"), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		banner := make([]byte, 7)
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		if _, err := conn.Read(banner); err != nil || string(banner) != "SSH-2.0" {
			t.Errorf("at its own address VM %s says %q, %v", id, banner, err)
		}
		_ = conn.Close()
	}
	if got := sh(t, m, "a", fmt.Sprintf("nc -w 3 %s 22 </dev/null 2>&1 || echo refused", vms[1].Network.GuestIP)); !strings.Contains(got, "refused") {
		t.Errorf("one guest reaches another: %q", got)
	}
	fetch := fmt.Sprintf("(%s) 2>/dev/null; true", fetchFrom(outsideAddr))
	for _, test := range []struct {
		policy smolvm.EgressPolicy
		want   string
	}{
		{smolvm.EgressPolicy{Default: smolvm.EgressDeny}, ""},
		{smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{"allow " + outsideAddr + ":80/tcp"}}, "from " + theHost},
	} {
		if _, err := m.SetEgress(t.Context(), "a", test.policy); err != nil {
			t.Fatal(err)
		}
		if got := sh(t, m, "a", fetch); got != test.want {
			t.Errorf("under %+v the outside answers by %q, want %q", test.policy, got, test.want)
		}
	}
	for _, id := range []string{"a", "b"} {
		ensure(t, m.Delete(t.Context(), id, smolvm.DeleteOptions{}))
	}
	if left := leftOnHost(t); left != nothingLeft {
		t.Errorf("left on the host: %s", left)
	}
}
