package usernet

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// namespaceEnv names the test that a process was made for.
const namespaceEnv = "SMOLVM_TEST_NAMESPACE"

// inOwnNetwork runs the test again in a process with a network of its own, so that
// it can change the network as it likes. It is true in that process.
func inOwnNetwork(t *testing.T) bool {
	t.Helper()
	if os.Getenv(namespaceEnv) == t.Name() {
		if err := runIP("link set lo up"); err != nil {
			t.Fatal(err)
		}
		return true
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("a network of the test's own needs the program ip: ", err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), namespaceEnv+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	output, err := cmd.CombinedOutput()
	if errors.Is(err, fs.ErrPermission) {
		t.Skip("a network of the test's own needs root or user namespaces: ", err)
	}
	if err != nil {
		t.Errorf("in its own network: %v\n%s", err, output)
	}
	if bytes.Contains(output, []byte("--- SKIP")) {
		t.Skipf("in its own network: %s", output)
	}
	return false
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
	fd int
}

// Addresses on the way to the outside; see RFC 5737.
var (
	hostOutsideAddr = netip.MustParseAddr("198.51.100.1")
	outsideAddr     = netip.MustParseAddr("198.51.100.2")
)

func newOutside(t testing.TB) outside {
	t.Helper()
	var fd int
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Skip("make a network namespace: ", err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	out := outside{t, fd}
	err = runIP(
		fmt.Sprintf("link add host type veth peer name outside netns /proc/%d/fd/%d", os.Getpid(), fd),
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
	err := onThread(func() error {
		if err := unix.Setns(o.fd, unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		o.Fatal("outside: ", err)
	}
}

// onThread runs f on a thread of its own, which ends with it: it may change its
// namespace.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}
