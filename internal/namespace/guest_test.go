package namespace_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/namespace/namespacetest"
	"github.com/smolvm/smolvm/internal/network/usernet"
	"github.com/smolvm/smolvm/internal/testenv"
)

// filesVariable tells a test that runs again as another user where a guest's files are.
const filesVariable = "SMOLVM_TEST_GUEST_FILES"

const (
	guestMAC = "02:00:00:00:00:15"
	// patience is how long a test waits for what a guest does.
	patience = 2 * time.Minute
)

// guestScript tests the network from inside. What a guest pings is cut into fragments if it is
// larger than a frame.
const guestScript = `
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
for size in 56 1472 1473 8000; do
	ping -c 3 -w 60 -q -s $size 10.0.2.2 >/dev/null && echo "pinged $size"
done
exec /bin/transfer 10.0.2.2
`

// guestFiles returns the directory with a guest's kernel and initramfs, which everybody may
// read.
func guestFiles(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv(filesVariable); dir != "" {
		return dir
	}
	dir, err := os.MkdirTemp("", "smolvm-guest-") //nolint:usetesting // t.TempDir lets nobody else in
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	copyFile(t, testenv.Kernel(t), filepath.Join(dir, "kernel"))
	copyFile(t, testenv.InitramfsWith(t, guestScript, "github.com/smolvm/smolvm/internal/testenv/transfer"), filepath.Join(dir, "initrd"))
	t.Setenv(filesVariable, dir)
	return dir
}

// A real guest behind a TAP is on the user-space network like one that takes the link itself.
func TestGuest(t *testing.T) {
	testenv.RequireQEMU(t)
	dir := guestFiles(t)
	eachUser(t, func(t *testing.T) { testGuest(t, dir) })
}

func testGuest(t *testing.T, dir string) {
	network, err := usernet.New(usernet.Config{
		Prefix: netip.MustParsePrefix("10.0.2.0/24"), Gateway: netip.MustParseAddr("10.0.2.2"),
		Guest: netip.MustParseAddr("10.0.2.15"), GuestMAC: guestMAC,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := network.Close(); err != nil {
			t.Error(err)
		}
	}()
	console := bootGuest(t, dir, network.Link().Socket)
	for _, want := range []string{"pinged 56", "pinged 1472", "pinged 1473", "pinged 8000", "transfer: answered over udp4", "transfer: answered over tcp4", "transfer: listening"} {
		for {
			line, err := console.ReadString('\n')
			if err != nil {
				t.Fatalf("wait for the guest to say %q: %v", want, err)
			}
			if strings.TrimSpace(line) == want {
				break
			}
			if strings.HasPrefix(line, "pinged") || strings.HasPrefix(line, "transfer") {
				t.Fatalf("the guest says %q, not %q", line, want)
			}
		}
	}
	go func() { _, _ = io.Copy(io.Discard, console) }()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	forward := network.Forward(listener, 7)
	defer func() { _ = forward.Close() }()
	packets, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	forwardPackets := network.ForwardPackets(packets, 7)
	defer func() { _ = forwardPackets.Close() }()
	for _, size := range []int{1, 1460, 1472, 1473, 9000} {
		echoed(t, packets.LocalAddr().String(), payload(size))
	}
	const size = 16 << 20
	for _, what := range []byte{'s', 'g'} {
		began := time.Now()
		transfer(t, listener.Addr().String(), what, size)
		t.Logf("%c: %.1f MB/s", what, float64(size)/1e6/time.Since(began).Seconds())
	}
}

// bootGuest starts a guest whose network interface leads to a link, and returns its console.
func bootGuest(t *testing.T, dir string, link *os.File) *bufio.Reader {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip(err)
	}
	netdev := "tap,id=net,ifname=" + namespace.TAP + ",script=no,downscript=no,vhost=off"
	cmd := exec.Command(qemu, "-accel", "tcg", "-machine", "q35", "-m", "256", "-nodefaults", "-no-reboot", "-display", "none",
		"-kernel", filepath.Join(dir, "kernel"), "-initrd", filepath.Join(dir, "initrd"), "-append", "console=ttyS0 quiet no_timer_check panic=-1",
		"-serial", "stdio", "-netdev", netdev, "-device", "virtio-net-pci,netdev=net,romfile=,mac="+guestMAC)
	cmd.Stdout, cmd.Stderr = write, os.Stderr
	process, err := namespace.Start(t.Context(), cmd, nil, namespace.Options{
		Program: namespacetest.Program(), Network: &namespace.Network{Link: link},
	})
	_ = write.Close()
	if err != nil {
		t.Fatal(err)
	}
	limit := time.AfterFunc(patience, func() { _ = process.Kill() })
	t.Cleanup(func() {
		limit.Stop()
		if err := process.Kill(); err != nil {
			t.Error(err)
		}
		_ = read.Close()
	})
	return bufio.NewReader(read)
}

// echoed sends a datagram to the guest until it comes back: one may be lost.
func echoed(t *testing.T, address string, want []byte) {
	t.Helper()
	conn, err := net.Dial("udp4", address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	limit := time.Now().Add(patience)
	for time.Now().Before(limit) {
		if _, err := conn.Write(want); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
		got := make([]byte, 1<<16)
		n, err := conn.Read(got)
		if err != nil {
			continue
		}
		if !bytes.Equal(got[:n], want) {
			t.Errorf("of %d bytes %d come back", len(want), n)
		}
		return
	}
	t.Errorf("a datagram of %d bytes does not come back", len(want))
}

// transfer moves bytes to the guest ("s") or from it ("g"), and compares what has arrived.
func transfer(t *testing.T, address string, what byte, size int) {
	t.Helper()
	conn, err := net.Dial("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	order := append([]byte{what}, binary.BigEndian.AppendUint64(nil, uint64(size))...)
	if _, err := conn.Write(order); err != nil {
		t.Fatal(err)
	}
	sum := sha256.New()
	if what == 's' {
		_, err = io.CopyN(io.MultiWriter(conn, sum), rand.NewChaCha8([32]byte{}), int64(size))
	} else {
		_, err = io.CopyN(sum, conn, int64(size))
	}
	if err != nil {
		t.Fatal(err)
	}
	theirs := make([]byte, sha256.Size)
	if _, err := io.ReadFull(conn, theirs); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(theirs, sum.Sum(nil)) {
		t.Error(fmt.Sprintf("%c: ", what), "the two sides have seen different bytes")
	}
}
