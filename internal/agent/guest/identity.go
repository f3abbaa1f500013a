package guest

import (
	"crypto/rand"
	"encoding/hex"
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

// become makes the guest what a hello says, and reports what it has become. What
// fails but leaves the guest usable is a warning.
func (a *agent) become(hello wire.Hello) (identity wire.Identity, warnings []string, err error) {
	warn := func(err error) {
		if err != nil {
			warnings = append(warnings, err.Error())
		}
	}
	if !a.first && !hello.Continues {
		a.rehearsal.begin(a.rehearse)
		warn(a.mounts.drop())
	}
	adopted := make(chan error, 1)
	go func() { adopted <- a.network.adopt(hello.Network) }()
	warn(setClock(hello.Time))
	warn(addEntropy(hello.Seed))
	warn(unix.Sethostname([]byte(hello.Hostname)))
	files := identityFiles{root: "/"}
	warn(files.write(hello))
	warn(a.setBootID(hello.BootID))
	trusted, trustErr := trust{root: "/"}.set(hello.Authority)
	warn(trustErr)
	hello.Env = withDefaults(hello.Env, trusted)
	err = a.server.SetIdentity(hello)
	warn(<-adopted)
	if err != nil {
		return identity, warnings, err
	}
	identity = a.identity()
	if a.network.ready(hello.Network) {
		return identity, warnings, nil
	}
	go a.connect(*hello.Network, a.server.holdBack())
	return identity, warnings, nil
}

// identity reads back by what programs and clients know the guest.
func (a *agent) identity() wire.Identity {
	machineID, _ := os.ReadFile("/etc/machine-id")
	bootID, _ := os.ReadFile(bootIDPath)
	random := make([]byte, randomSample)
	_, _ = rand.Read(random) // never fails: crypto/rand ends the program instead
	var name unix.Utsname
	_ = unix.Uname(&name)
	return wire.Identity{
		Hostname:  unix.ByteSliceToString(name.Nodename[:]),
		MachineID: trimLine(machineID),
		BootID:    trimLine(bootID),
		HostKey:   a.server.fingerprint(),
		MAC:       a.network.mac(),
		Random:    hex.EncodeToString(random),
	}
}

// randomSample is how many bytes of the kernel's random numbers the host gets to see.
const randomSample = 16

// bootIDPath is where programs find the identifier of the guest's boot; see random(4).
const bootIDPath = "/proc/sys/kernel/random/boot_id"

// setBootID replaces the identifier of the guest's boot. The kernel makes one when it is
// first asked for it, and never another, so clones of a guest that has asked would have
// the same. It is covered by a file of ours, from the beginning if no other init runs
// that would see it change.
func (a *agent) setBootID(id string) error {
	if id == "" {
		return nil
	}
	err := overwrite(bootIDPath, int64(len(id)+1), id+"\n")
	if err == nil || (a.first && os.Getpid() != 1) {
		return nil // the file is ours already
	}
	const path = "/run/smolvm/boot_id"
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("set boot id: %w", err)
	}
	if err := os.WriteFile(path, []byte(id+"\n"), 0o444); err != nil {
		return fmt.Errorf("set boot id: %w", err)
	}
	if err := unix.Mount(path, bootIDPath, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("set boot id: %w", err)
	}
	return nil
}

// connect sets the network up while the host logs in, and then lets the commands
// start that wait for it.
func (a *agent) connect(network wire.Network, release func()) {
	defer release()
	if err := a.loadLate(); err != nil {
		a.say(err.Error())
	}
	// Before the network is up, as who connects too early would be refused.
	if err := errors.Join(a.listenTCP(), a.network.setUp(network)); err != nil {
		a.say(err.Error())
	}
	a.network.await()
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

func (f identityFiles) write(hello wire.Hello) error {
	errs := []error{
		f.put("etc/hostname", hello.Hostname+"\n"),
		f.put("etc/machine-id", hello.MachineID+"\n"),
		f.hosts(hello.Hostname),
	}
	if hello.Network != nil && len(hello.Network.DNS) > 0 {
		errs = append(errs, f.put("etc/resolv.conf", resolvConf(hello.Network.DNS, hello.Network.Search)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("write identity: %w", err)
	}
	return nil
}

// resolvConf returns the text of /etc/resolv.conf.
func resolvConf(servers []netip.Addr, search []string) string {
	var lines strings.Builder
	for _, server := range servers {
		lines.WriteString("nameserver " + server.String() + "\n")
	}
	if len(search) > 0 {
		lines.WriteString("search " + strings.Join(search, " ") + "\n")
	}
	return lines.String()
}

// put makes a file have a text. It is overwritten where it is: making another and
// renaming it costs an emulated guest that was just restored 50 ms, as it has never run
// the kernel's code for that. A link, as resolv.conf often is, becomes a file.
func (f identityFiles) put(name, text string) error {
	path := filepath.Join(f.root, name)
	if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() {
		return overwrite(path, info.Size(), text)
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

// overwrite replaces the text of a file of some size, unless it has that text already.
func overwrite(path string, size int64, text string) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	old := make([]byte, size)
	if n, err := file.ReadAt(old, 0); err == nil && string(old[:n]) == text {
		return nil
	}
	if _, err := file.WriteAt([]byte(text), 0); err != nil {
		return err
	}
	if size <= int64(len(text)) {
		return nil
	}
	return file.Truncate(int64(len(text)))
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
