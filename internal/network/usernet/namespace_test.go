package usernet

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/smolvm/smolvm/internal/network/nettest"
)

// inOwnNetwork runs the test again in a process with a network of its own, which it can
// change as it likes by the program ip. It is true in that process.
func inOwnNetwork(t *testing.T) bool {
	t.Helper()
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("a network of the test's own needs the program ip: ", err)
	}
	return nettest.InOwnNetwork(t)
}

// runIP runs the program ip once for each line of arguments.
func runIP(lines ...string) error {
	for _, line := range lines {
		if output, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", line, err, output)
		}
	}
	return nil
}

// outside is another network namespace: the host's only neighbour.
type outside struct {
	testing.TB
	*nettest.Namespace
}

// Addresses on the way to the outside; see RFC 5737.
var (
	hostOutsideAddr = netip.MustParseAddr("198.51.100.1")
	outsideAddr     = netip.MustParseAddr("198.51.100.2")
)

func newOutside(t testing.TB) outside {
	t.Helper()
	out := outside{t, nettest.New(t)}
	err := runIP(
		fmt.Sprintf("link add host type veth peer name outside netns /proc/%d/fd/%d", os.Getpid(), out.FD()),
		"addr add "+hostOutsideAddr.String()+"/24 brd + dev host",
		"link set host up",
	)
	if err != nil {
		t.Skip("make a pair of interfaces: ", err)
	}
	out.run(func() error {
		return runIP("addr add "+outsideAddr.String()+"/24 dev outside", "link set outside up")
	})
	return out
}

// run runs f outside.
func (o outside) run(f func() error) {
	o.Helper()
	if err := o.Do(f); err != nil {
		o.Fatal("outside: ", err)
	}
}
