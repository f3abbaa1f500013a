package vmmtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"

	"github.com/smolvm/smolvm/internal/vmm"
)

// tapEnv makes a test's process the one of [tap] that has a network namespace of its own.
const tapEnv = "SMOLVM_VMMTEST_TAP"

// tapName is the name of the TAP interface there.
const tapName = "vmmtest-tap"

// tap: a guest's interface is a TAP of the host, through which it reaches the host's own
// stack. The TAP is in a network namespace of a process that is this test, run again.
func tap(k *kit) {
	if k.assets.SkipTAP != "" {
		k.Skip(k.assets.SkipTAP)
	}
	if os.Getenv(tapEnv) != "" {
		onTAP(k)
		return
	}
	if os.Getuid() != 0 {
		k.Skip("making a network namespace takes root")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		k.Skip("this host has no TAP interfaces: ", err)
	}
	ctx, cancel := context.WithTimeout(k.Context(), 4*patience)
	defer cancel()
	cmd := k.again(ctx, tapEnv)
	// The kernel sends it the signal when the thread that has started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	output, err := cmd.CombinedOutput()
	if _, ran := errors.AsType[*exec.ExitError](err); err != nil && !ran {
		k.Skip("network namespaces are not allowed here: ", err)
	}
	if err != nil || !bytes.Contains(output, []byte("PASS")) {
		k.Errorf("in a network namespace: %v\n%s", err, output)
	}
}

// again returns a command that runs this test, and no other, with a variable set.
func (k *kit) again(ctx context.Context, variable string) *exec.Cmd {
	var pattern []string
	for name := range strings.SplitSeq(k.Name(), "/") {
		pattern = append(pattern, "^"+regexp.QuoteMeta(name)+"$")
	}
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run="+strings.Join(pattern, "/"))
	cmd.Env = append(os.Environ(), variable+"=1", "TMPDIR="+k.root)
	return cmd
}

func onTAP(k *kit) {
	nic := func(name string) func(*vmm.Config) {
		return func(c *vmm.Config) { c.NIC = &vmm.NIC{MAC: guestMAC, MTU: 1400, TAP: name} }
	}
	k.sub("that is not there", func(k *kit) { _ = k.mustFail(k.Context(), nic(tapName), tapName) })
	k.sub("that is none", func(k *kit) { _ = k.mustFail(k.Context(), nic("lo"), "lo: it is no TAP") })
	makeTAP(k)
	// What the guest fetches is more than a frame, and than is sent at once.
	data := make([]byte, 4<<20)
	_, _ = rand.Read(data) // never fails
	listener, err := (&net.ListenConfig{}).Listen(k.Context(), "tcp4", net.JoinHostPort(hostIP, "0"))
	if err != nil {
		k.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(data) })} //nolint:gosec // of one test
	go func() { _ = server.Serve(listener) }()
	defer func() { _ = server.Close() }()
	sum := sha256.Sum256(data)
	for range 2 { // a VM that has ended has let go of it
		g := k.boot(nic(tapName))
		if got := g.run("cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address"); got != k.mtu()+"\n"+guestMAC {
			k.Errorf("the guest's MTU and MAC are %q", got)
		}
		g.run("ip link set eth0 up && ip addr add " + guestIP + "/24 dev eth0")
		g.run("ping -c 1 -w 60 -q " + hostIP)
		if got := g.run("wget -q -O - http://" + listener.Addr().String() + "/ | sha256sum"); !strings.HasPrefix(got, hex.EncodeToString(sum[:])) {
			k.Errorf("what the guest fetched has the hash %s", got)
		}
		k.sub("that is used", func(k *kit) { _ = k.mustFail(k.Context(), nic(tapName), "another VM or program uses it") })
		g.killed()
	}
}

// makeTAP makes the TAP interface, which lasts as long as its network namespace.
func makeTAP(k *kit) {
	k.Helper()
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: tapName}, Mode: netlink.TUNTAP_MODE_TAP}
	err := netlink.LinkAdd(link)
	if err == nil {
		var address *netlink.Addr
		if address, err = netlink.ParseAddr(hostIP + "/24"); err == nil {
			err = netlink.AddrAdd(link, address)
		}
	}
	if err == nil {
		err = netlink.LinkSetMTU(link, 1400)
	}
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		k.Fatal("make a TAP interface: ", err)
	}
}

// badNIC: an interface that can't be is refused, and says why.
func badNIC(k *kit) {
	_, theirs := linkPair(k)
	k.Cleanup(func() { _ = theirs.Close() })
	for want, nic := range map[string]vmm.NIC{
		"neither a link nor a TAP interface":             {MAC: guestMAC},
		`a link and the TAP interface "` + tapName + `"`: {MAC: guestMAC, Link: theirs, TAP: tapName},
		"is no name of a TAP interface":                  {MAC: guestMAC, TAP: "tap%d"},
	} {
		_ = k.mustFail(k.Context(), func(c *vmm.Config) { c.NIC = &nic }, want)
	}
}
