package guest

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// become makes the guest what a greeting says. What fails but leaves the guest
// usable is a warning.
func (a *agent) become(greeting wire.Greeting) (warnings []string, err error) {
	warn := func(err error) {
		if err != nil {
			warnings = append(warnings, err.Error())
		}
	}
	warn(setClock(greeting.Time))
	warn(addEntropy(greeting.Seed))
	warn(unix.Sethostname([]byte(greeting.Hostname)))
	files := identityFiles{root: "/"}
	warn(files.write(greeting))
	if err := a.server.SetIdentity(greeting); err != nil {
		return warnings, err
	}
	go a.connect(greeting.Network, a.server.holdBack())
	return warnings, nil
}

// connect sets the network up while the host logs in, and then lets the commands
// start that wait for it.
func (a *agent) connect(network *wire.Network, release func()) {
	defer release()
	if err := a.loadLate(); err != nil {
		a.say(err.Error())
	}
	if network == nil {
		return
	}
	err := setUpNetwork(*network)
	if err == nil {
		err = a.listenTCP()
	}
	if err != nil {
		a.say(err.Error())
	}
}

// setClock sets the wall clock; the host may have had its guest stopped for long.
func setClock(now time.Time) error {
	if now.IsZero() {
		return nil
	}
	value := unix.NsecToTimeval(now.UnixNano())
	if err := unix.Settimeofday(&value); err != nil {
		return fmt.Errorf("set clock: %w", err)
	}
	return nil
}

// Requests of random(4).
const (
	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207
)

// addEntropy mixes a seed into the kernel's random number generator and makes it
// use it at once. Guests that were cloned from one another would draw the same
// numbers without.
func addEntropy(seed []byte) error {
	if len(seed) == 0 {
		return nil
	}
	random, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	defer func() { _ = random.Close() }()
	var info struct {
		bits, size int32
		bytes      [512]byte
	}
	n := copy(info.bytes[:], seed)
	info.bits, info.size = int32(8*n), int32(n)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, random.Fd(), rndAddEntropy, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, random.Fd(), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed: %w", errno)
	}
	return nil
}

// identityFiles writes the files by which programs know the guest.
type identityFiles struct{ root string }

func (f identityFiles) write(greeting wire.Greeting) error {
	errs := []error{
		f.put("etc/hostname", greeting.Hostname+"\n"),
		f.put("etc/machine-id", greeting.MachineID+"\n"),
		f.hosts(greeting.Hostname),
	}
	if greeting.Network != nil && len(greeting.Network.DNS) > 0 {
		var lines strings.Builder
		for _, server := range greeting.Network.DNS {
			lines.WriteString("nameserver " + server.String() + "\n")
		}
		errs = append(errs, f.put("etc/resolv.conf", lines.String()))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("write identity: %w", err)
	}
	return nil
}

// put replaces a file, even one that is a link to where nothing is yet, as
// resolv.conf often is.
func (f identityFiles) put(name, text string) error {
	path := filepath.Join(f.root, name)
	if old, err := os.ReadFile(path); err == nil && string(old) == text {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	temp := path + ".smolvm"
	if err := os.WriteFile(temp, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// hostsMark ends the line of /etc/hosts that is ours.
const hostsMark = "# smolvm"

// hosts makes the guest know its own name, and leaves all other lines alone.
func (f identityFiles) hosts(hostname string) error {
	old, err := os.ReadFile(filepath.Join(f.root, "etc/hosts"))
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	var text strings.Builder
	for line := range strings.Lines(string(old)) {
		if !strings.HasSuffix(strings.TrimRight(line, "\n"), hostsMark) {
			text.WriteString(line)
		}
	}
	if len(old) == 0 {
		text.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost\n")
	}
	text.WriteString("127.0.1.1\t" + hostname + "\t" + hostsMark + "\n")
	return f.put("etc/hosts", text.String())
}

// setUpNetwork configures the loopback interface and the one of the given MAC.
// Everything is done by ioctl (netdevice(7)): netlink would need a library that is
// a tenth of the agent.
func setUpNetwork(network wire.Network) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set up network: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := raise(fd, "lo"); err != nil {
		return fmt.Errorf("set up network: %w", err)
	}
	name, err := findInterface(network.MAC)
	if err != nil {
		return fmt.Errorf("set up network: %w", err)
	}
	steps := []func() error{
		func() error { return setAddress(fd, name, unix.SIOCSIFADDR, network.Address.Addr()) },
		func() error { return setAddress(fd, name, unix.SIOCSIFNETMASK, netmask(network.Address.Bits())) },
		func() error { return setMTU(fd, name, network.MTU) },
		func() error { return raise(fd, name) },
		func() error { return addDefaultRoute(fd, network.Gateway) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("set up interface %s: %w", name, err)
		}
	}
	return nil
}

func findInterface(mac string) (string, error) {
	paths, err := filepath.Glob("/sys/class/net/*/address")
	if err != nil {
		return "", err
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err == nil && strings.EqualFold(trimLine(text), mac) {
			return filepath.Base(filepath.Dir(path)), nil
		}
	}
	return "", fmt.Errorf("no interface has the address %s", mac)
}

func netmask(bits int) netip.Addr {
	mask := ^uint32(0) << (32 - bits)
	return netip.AddrFrom4([4]byte{byte(mask >> 24), byte(mask >> 16), byte(mask >> 8), byte(mask)})
}

// ifreq is struct ifreq of netdevice(7).
type ifreq struct {
	name [unix.IFNAMSIZ]byte
	data [24]byte
}

func newIfreq(name string) *ifreq {
	var r ifreq
	copy(r.name[:unix.IFNAMSIZ-1], name)
	return &r
}

func (r *ifreq) do(fd int, request uintptr) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(r))); errno != 0 {
		return errno
	}
	return nil
}

// sockaddr is struct sockaddr_in with no port.
func sockaddr(addr netip.Addr) (raw [16]byte) {
	*(*uint16)(unsafe.Pointer(&raw)) = unix.AF_INET
	four := addr.As4()
	copy(raw[4:], four[:])
	return raw
}

func setAddress(fd int, name string, request uintptr, addr netip.Addr) error {
	r := newIfreq(name)
	raw := sockaddr(addr)
	copy(r.data[:], raw[:])
	return r.do(fd, request)
}

func setMTU(fd int, name string, mtu int) error {
	if mtu == 0 {
		return nil
	}
	r := newIfreq(name)
	*(*int32)(unsafe.Pointer(&r.data)) = int32(mtu)
	return r.do(fd, unix.SIOCSIFMTU)
}

func raise(fd int, name string) error {
	r := newIfreq(name)
	if err := r.do(fd, unix.SIOCGIFFLAGS); err != nil {
		return err
	}
	*(*uint16)(unsafe.Pointer(&r.data)) |= unix.IFF_UP | unix.IFF_RUNNING
	return r.do(fd, unix.SIOCSIFFLAGS)
}

// rtentry is struct rtentry of the kernel's include/uapi/linux/route.h.
type rtentry struct {
	_                  uint64
	dst, gateway, mask [16]byte
	flags              uint16
	_                  int16
	_                  uint64
	_                  uintptr
	metric             int16
	dev                uintptr
	mtu, window        uint64
	irtt               uint16
}

func addDefaultRoute(fd int, gateway netip.Addr) error {
	if !gateway.IsValid() {
		return nil
	}
	route := rtentry{
		dst:     sockaddr(netip.IPv4Unspecified()),
		gateway: sockaddr(gateway),
		mask:    sockaddr(netip.IPv4Unspecified()),
		flags:   unix.RTF_UP | unix.RTF_GATEWAY,
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&route)))
	if errno != 0 && errno != unix.EEXIST {
		return fmt.Errorf("route by %s: %w", gateway, errno)
	}
	return nil
}
