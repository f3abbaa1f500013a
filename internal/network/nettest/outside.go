package nettest

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// InOwnNetworkWithIP is [InOwnNetwork] for a test that changes its network by the program ip.
// Where there is no such program, the test is skipped.
func InOwnNetworkWithIP(t testing.TB) bool {
	t.Helper()
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("a network of the test's own needs the program ip: ", err)
	}
	return InOwnNetwork(t)
}

// RunIP runs the program ip once for each line of arguments.
func RunIP(lines ...string) error {
	for _, line := range lines {
		if output, err := exec.CommandContext(context.Background(), "ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", line, err, output)
		}
	}
	return nil
}

// Outside is another network namespace: the host's only neighbour.
type Outside struct {
	t testing.TB
	*Namespace
}

// HostOutside returns the host's address on the way to the outside; see RFC 5737.
func HostOutside() netip.Addr { return netip.AddrFrom4([4]byte{198, 51, 100, 1}) }

// OutsideAddr returns the address of the outside.
func OutsideAddr() netip.Addr { return netip.AddrFrom4([4]byte{198, 51, 100, 2}) }

// NewOutside makes the outside, and the host's interface to it, which is called host. Where
// that can't be made, the test is skipped.
func NewOutside(t testing.TB) Outside {
	t.Helper()
	out := Outside{t, New(t)}
	err := RunIP(
		fmt.Sprintf("link add host type veth peer name outside netns /proc/%d/fd/%d", os.Getpid(), out.FD()),
		"addr add "+HostOutside().String()+"/24 brd + dev host",
		"link set host up",
	)
	if err != nil {
		t.Skip("make a pair of interfaces: ", err)
	}
	out.Run(func() error {
		return RunIP("addr add "+OutsideAddr().String()+"/24 dev outside", "link set outside up")
	})
	return out
}

// Run runs f outside. If that fails, the test ends.
func (o Outside) Run(f func() error) {
	o.t.Helper()
	if err := o.Do(f); err != nil {
		o.t.Fatal("outside: ", err)
	}
}
