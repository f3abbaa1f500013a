package namespace_test

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/namespace/namespacetest"
)

// The roles of this test's program, by its first argument.
const (
	guestRole   = "guest"   // a VMM that uses tap0
	parentRole  = "parent"  // starts a command and waits to be killed
	anybodyRole = "anybody" // becomes a user with no rights
)

func TestMain(m *testing.M) {
	namespacetest.Main()
	if len(os.Args) > 1 {
		if role := roles()[os.Args[1]]; role != nil {
			if err := role(); err != nil {
				fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
				os.Exit(1)
			}
			return
		}
	}
	os.Exit(namespacetest.Run(m))
}

func roles() map[string]func() error {
	return map[string]func() error{guestRole: guest, parentRole: parent, anybodyRole: becomeAnybody}
}

// self returns the command line of this program in a role.
func self(role string, args ...string) []string {
	return append([]string{os.Args[0], role}, args...)
}

// command returns this program in a role.
func command(role string, args ...string) *exec.Cmd {
	argv := self(role, args...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stderr = os.Stderr
	return cmd
}

// anybody is a user with no privilege and no files (nobody, on most hosts).
const anybody = 65534

// rootless makes a test run again as a user who is not root, on a host where everybody may
// open /dev/net/tun, as on most.
const rootless = "SMOLVM_TEST_ROOTLESS"

// eachUser runs a test as this user, and as one who is not root.
func eachUser(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	if err := namespace.Check(t.Context(), namespacetest.Program()); err != nil {
		t.Skip(err)
	}
	t.Run("this user", test)
	if os.Getuid() != 0 {
		return
	}
	t.Run("anybody", func(t *testing.T) {
		dir, err := os.MkdirTemp("", "smolvm-namespace-") //nolint:usetesting // t.TempDir lets nobody else in
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		program := filepath.Join(dir, "test")
		copyFile(t, os.Args[0], program)
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		name, _, _ := strings.Cut(t.Name(), "/")
		cmd := exec.Command(program, anybodyRole, "-test.v", "-test.run=^"+regexp.QuoteMeta(name)+"$")
		cmd.Env = append(os.Environ(), rootless+"=1", "HOME=/", "TMPDIR=/tmp")
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		if err == nil && bytes.Contains(out, []byte("SKIP: "+name)) {
			t.Skipf("as user %d: %s", anybody, out)
		}
		if err != nil || !bytes.Contains(out, []byte("PASS: "+name)) {
			t.Errorf("as user %d: %v\n%s", anybody, err, out)
		}
	})
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, text, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// becomeAnybody runs this program's tests as another user, in a mount namespace in which
// everybody may open /dev/net/tun.
func becomeAnybody() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tun", "/dev/net", "tmpfs", 0, "mode=0755"); err != nil {
		return err
	}
	if err := unix.Mknod("/dev/net/tun", unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		return err
	}
	if err := os.Chmod("/dev/net/tun", 0o666); err != nil {
		return err
	}
	cmd := exec.Command(os.Args[0], os.Args[2:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: anybody, Gid: anybody}}
	return cmd.Run()
}

// vnetHeader is that of virtio, as Firecracker has it: 12 bytes; see virtio_net.h.
const vnetHeader = 12

// guest is a VMM: it opens tap0 as Firecracker does, sends what it reads (a line for each
// frame, in hex), and prints what it receives. It ends with its standard input.
func guest() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	request, err := unix.NewIfreq(namespace.TAP)
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return err
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHeader); err != nil {
		return err
	}
	const offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_UFO
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads); err != nil {
		return err
	}
	tap := os.NewFile(uintptr(fd), namespace.TAP)
	fmt.Println("open")
	go func() {
		frame := make([]byte, 1<<17)
		for {
			n, err := tap.Read(frame)
			if err != nil {
				return
			}
			fmt.Println(hex.EncodeToString(frame[:n]))
		}
	}()
	lines := bufio.NewReader(os.Stdin)
	for {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		frame, hexErr := hex.DecodeString(strings.TrimSpace(line))
		if err != nil || hexErr != nil {
			return errors.Join(err, hexErr)
		}
		if _, err := tap.Write(frame); err != nil {
			return err
		}
	}
}

// vm is a guest in a namespace, and its link.
type vm struct {
	*testing.T
	process *namespace.Process
	link    net.Conn
	stdin   *os.File
	stdout  *bufio.Reader
}

// newLink returns the ends of a link.
func newLink(t testing.TB) (ours net.Conn, theirs *os.File) {
	t.Helper()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(ends[0]), "link")
	ours, err = net.FileConn(file)
	_ = file.Close()
	if err != nil {
		t.Fatal(err)
	}
	return ours, os.NewFile(uintptr(ends[1]), "link")
}

// startGuest starts a guest that has the TAP open.
func startGuest(t *testing.T, mtu int) *vm {
	t.Helper()
	link, theirs := newLink(t)
	stdinRead, stdin, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, stdoutWrite, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := command(guestRole)
	cmd.Stdin, cmd.Stdout = stdinRead, stdoutWrite
	process, err := namespace.Start(t.Context(), cmd, nil, namespace.Options{
		Program: namespacetest.Program(), Network: &namespace.Network{Link: theirs, MTU: mtu},
	})
	_, _, _ = theirs.Close(), stdinRead.Close(), stdoutWrite.Close()
	if err != nil {
		t.Fatal(err)
	}
	g := &vm{T: t, process: process, link: link, stdin: stdin, stdout: bufio.NewReader(stdout)}
	t.Cleanup(func() {
		_ = stdin.Close()
		<-process.Done()
		if !process.Success() {
			t.Errorf("the guest has ended with %s", process.Exit())
		}
		_, _ = link.Close(), stdout.Close()
	})
	if got := g.line(); got != "open" {
		t.Fatalf("the guest says %q", got)
	}
	g.settle()
	return g
}

// settle returns when frames pass. The kernel takes a moment to bring up a bridge's port that
// has been opened; what is sent before is lost.
func (g *vm) settle() {
	g.Helper()
	hello := ethernet("ff:ff:ff:ff:ff:ff", 46, 0)
	hello[13] = helloType
	for {
		g.send(hello)
		_ = g.link.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		_, err := g.link.Read(make([]byte, len(hello)))
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			g.Fatal(err)
		}
	}
	_ = g.link.SetReadDeadline(time.Time{})
}

// helloType is the second byte of the protocol of what settle sends.
const helloType = 0xb6

func (g *vm) line() string {
	g.Helper()
	line, err := g.stdout.ReadString('\n')
	if err != nil {
		g.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// send makes the guest send a frame as it is.
func (g *vm) send(frame []byte) {
	g.Helper()
	g.offload(nil, frame)
}

// offload makes the guest send a frame behind a header of virtio, which says what is left to
// do for it.
func (g *vm) offload(header, frame []byte) {
	g.Helper()
	full := append(make([]byte, vnetHeader), frame...)
	copy(full, header)
	if _, err := g.stdin.WriteString(hex.EncodeToString(full) + "\n"); err != nil {
		g.Fatal(err)
	}
}

// receive returns the next frame that the guest receives.
func (g *vm) receive() []byte {
	g.Helper()
	frame, err := hex.DecodeString(g.line())
	if err != nil || len(frame) < vnetHeader {
		g.Fatalf("the guest received %x, %v", frame, err)
	}
	return frame[vnetHeader:]
}

// next returns the next frame on the link.
func (g *vm) next() []byte {
	g.Helper()
	for {
		frame := make([]byte, 1<<17)
		n, err := g.link.Read(frame)
		if err != nil {
			g.Fatal(err)
		}
		if n > 13 && (frame[12] != 0x88 || frame[13] != helloType) {
			return frame[:n]
		}
	}
}

// ethernet returns a frame of a protocol that no kernel knows.
func ethernet(to string, length int, fill byte) []byte {
	mac, err := net.ParseMAC(to)
	if err != nil {
		panic(err)
	}
	frame := append(mac, 0x02, 0, 0, 0, 0, 1, 0x88, 0xb5) // for experiments; see IEEE 802
	return append(frame, bytes.Repeat([]byte{fill}, length)...)
}

// Frames pass as they are, both ways, and no others: those that are too long are lost, and the
// kernel has nothing to say.
func TestFrames(t *testing.T) {
	eachUser(t, func(t *testing.T) {
		for _, mtu := range []int{0, 1280, 9000, 65521} {
			t.Run(fmt.Sprint(mtu), func(t *testing.T) {
				g := startGuest(t, mtu)
				if mtu == 0 {
					mtu = namespace.DefaultMTU
				}
				for i, to := range []string{"02:00:00:00:00:02", "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01", "01:00:5e:00:00:fb"} {
					for _, length := range []int{46, mtu} {
						want := ethernet(to, length, byte(i+1))
						g.send(want)
						if got := g.next(); !bytes.Equal(got, want) {
							t.Fatalf("from the guest to %s, %d bytes: got %d bytes, %.40x", to, length, len(got), got)
						}
						if _, err := g.link.Write(want); err != nil {
							t.Fatal(err)
						}
						if got := g.receive(); !bytes.Equal(got, want) {
							t.Fatalf("to the guest at %s, %d bytes: got %d bytes, %.40x", to, length, len(got), got)
						}
					}
				}
				if mtu > 60000 {
					return // none is longer
				}
				marker := ethernet("02:00:00:00:00:02", 46, 99)
				g.send(ethernet("02:00:00:00:00:02", mtu+5, 98))
				g.send(marker)
				if got := g.next(); !bytes.Equal(got, marker) {
					t.Errorf("a frame of %d bytes has left the guest with an MTU of %d", len(got), mtu)
				}
				for _, tooLong := range []int{5, 2000} {
					if _, err := g.link.Write(ethernet("02:00:00:00:00:02", mtu+tooLong, 98)); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := g.link.Write(marker[:9]); err != nil { // no frame at all
					t.Fatal(err)
				}
				if _, err := g.link.Write(marker); err != nil {
					t.Fatal(err)
				}
				if got := g.receive(); !bytes.Equal(got, marker) {
					t.Errorf("a frame of %d bytes has reached the guest with an MTU of %d", len(got), mtu)
				}
			})
		}
	})
}

// The command has its namespaces and no rights in them.
func TestRights(t *testing.T) {
	eachUser(t, func(t *testing.T) {
		got := output(t, "cat /proc/self/status; ls /sys/class/net 2>/dev/null; cat /proc/net/dev /proc/net/if_inet6; echo \"fds: $(ls /proc/self/fd | tr '\\n' ' ')\"; echo $0 $1; echo $SMOLVM_TEST_ENV; cat")
		for _, want := range []string{
			"CapInh:\t0000000000000000", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000",
			"CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1",
			fmt.Sprintf("Uid:\t%d\t", os.Getuid()), fmt.Sprintf("Gid:\t%d\t", os.Getgid()),
			"tap0:", "link0:", "bridge0:", "fds: 0 1 2 3 \n", "name argument\n", "of the environment\n", "of the input\n",
		} {
			if !strings.Contains(got, want) {
				t.Errorf("the command lacks %q", want)
			}
		}
		if strings.Contains(got, "eth0:") || strings.Contains(got, "fe80") {
			t.Error("there is more in its network than there should be")
		}
		if t.Failed() {
			t.Log(got)
		}
	})
}

// output returns what a script prints in a namespace.
func output(t *testing.T, script string) string {
	t.Helper()
	link, theirs := newLink(t)
	defer func() { _, _ = link.Close(), theirs.Close() }()
	dir := t.TempDir()
	input, err := os.Create(filepath.Join(dir, "in"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = input.Close() }()
	_, _ = input.WriteString("of the input\n")
	_, _ = input.Seek(0, io.SeekStart)
	printed, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = printed.Close() }()
	cmd := exec.Command("/bin/sh", "-c", script, "name", "argument")
	cmd.Env = append(os.Environ(), "SMOLVM_TEST_ENV=of the environment")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = input, printed, printed
	process, err := namespace.Start(t.Context(), cmd, nil, namespace.Options{
		Program: namespacetest.Program(), Network: &namespace.Network{Link: theirs},
	})
	if err != nil {
		t.Fatal(err)
	}
	<-process.Done()
	text, err := os.ReadFile(printed.Name())
	if err != nil || !process.Success() {
		t.Fatalf("%v, %s: %s", err, process.Exit(), text)
	}
	return string(text)
}
