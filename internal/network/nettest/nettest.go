// Package nettest gives tests networks of their own: each is a network namespace, from which
// no packet gets out.
package nettest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// namespaceEnv names the test that a process was made for.
const namespaceEnv = "SMOLVM_TEST_NAMESPACE"

// InOwnNetwork runs the test again in a process with a network of its own, so that it can
// change the network as it likes. It reports whether this is that process. Where no such
// network can be made, the test is skipped.
func InOwnNetwork(t testing.TB) bool {
	t.Helper()
	if os.Getenv(namespaceEnv) == t.Name() {
		if err := setUp("lo"); err != nil {
			t.Fatal(err)
		}
		return true
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), namespaceEnv+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	// The signal at the parent's death follows the thread that has forked.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	output, err := cmd.CombinedOutput()
	switch {
	case errors.Is(err, fs.ErrPermission):
		t.Skip("a network of the test's own needs root or user namespaces: ", err)
	case err != nil:
		t.Errorf("in its own network: %v\n%s", err, output)
	case bytes.Contains(output, []byte("--- SKIP: "+t.Name()+" ")):
		t.Skipf("in its own network: %s", output)
	default:
		t.Logf("in its own network:\n%s", output)
	}
	return false
}

func setUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("set interface %s up: %w", name, err)
	}
	return nil
}

// Namespace is another network namespace.
type Namespace struct{ fd int }

// New makes a namespace, with its loopback interface up, that lasts as long as the test.
func New(t testing.TB) *Namespace {
	t.Helper()
	n := &Namespace{}
	err := OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		if n.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		return setUp("lo")
	})
	if err != nil {
		t.Skip("make a network namespace: ", err)
	}
	t.Cleanup(func() { _ = unix.Close(n.fd) })
	return n
}

// FD returns a descriptor of the namespace.
func (n *Namespace) FD() int { return n.fd }

// Do runs f in the namespace. Sockets that it makes stay there.
func (n *Namespace) Do(f func() error) error {
	return OnThread(func() error {
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the namespace: %w", err)
		}
		return f()
	})
}

// OnThread runs f on a thread of its own, which ends with it: it may change its namespace.
func OnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

// Configure gives an interface addresses, and sets it up.
func Configure(name string, cidrs ...string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	for _, cidr := range cidrs {
		ip, n, err := net.ParseCIDR(cidr)
		if err != nil {
			return err
		}
		n.IP = ip
		addr := &netlink.Addr{IPNet: n}
		if ip.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("give %s to interface %s: %w", cidr, name, err)
		}
	}
	return setUp(name)
}

// Route adds a route to a network, by a gateway or, if that is empty, by an interface.
func Route(cidr, gateway, name string) error {
	_, to, err := net.ParseCIDR(cidr)
	if err != nil {
		return err
	}
	route := &netlink.Route{Dst: to, Gw: net.ParseIP(gateway)}
	if name != "" {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find interface %s: %w", name, err)
		}
		route.LinkIndex = link.Attrs().Index
		if gateway != "" {
			route.Flags = int(netlink.FLAG_ONLINK)
		}
	}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("add a route to %s: %w", cidr, err)
	}
	return nil
}

// OpenTAP makes a TAP interface in the namespace of the calling thread, or opens the one of
// that name, and returns its file: each read and each write is a frame.
func OpenTAP(name string) (*os.File, error) { return openTAP(name, 0, 0) }

// OpenOffloadingTAP is OpenTAP for what leaves checksums and segments to the kernel, as VMMs do:
// each read and each write is a header of virtio, and a frame of up to 64 KiB.
func OpenOffloadingTAP(name string) (*os.File, error) {
	return openTAP(name, unix.IFF_VNET_HDR, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6|unix.TUN_F_TSO_ECN)
}

func openTAP(name string, flags uint16, offloads int) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open TAP interface %s: %w", name, err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err == nil && offloads != 0 {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("open TAP interface %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Pump takes frames from one file to another until one is closed.
func Pump(from, to *os.File) {
	frame := make([]byte, 1<<17) // with a header
	for {
		size, err := from.Read(frame)
		if err != nil {
			return
		}
		if _, err := to.Write(frame[:size]); errors.Is(err, fs.ErrClosed) {
			return
		}
	}
}
