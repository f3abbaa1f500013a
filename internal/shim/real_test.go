package shim_test

import (
	"bufio"
	"crypto/ed25519"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
)

// newRealFixture prepares the launch of a real VM, with agent and network.
func newRealFixture(t *testing.T) *fixture {
	t.Helper()
	testenv.RequireQEMU(t)
	image := testenv.Image(t)
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	f := newFixture(t)
	network := testNetwork()
	spec := &f.opts.Spec
	spec.Backend, spec.Network = "qemu", network
	spec.Hello = &wire.Hello{
		Hostname: "host", MachineID: strings.Repeat("0", 32), HostKey: key,
		Network: &wire.Network{
			MAC: network.GuestMAC, Address: netip.PrefixFrom(network.Guest, network.Prefix.Bits()),
			Gateway: network.Gateway, DNS: []netip.Addr{network.Gateway},
		},
	}
	spec.VMM.ID, spec.VMM.Accelerator, spec.VMM.VCPUs, spec.VMM.MemoryMiB = spec.ID, vmm.TCG, 1, 256
	spec.VMM.Kernel, spec.VMM.Initrd = image.KernelPath, image.InitrdPath
	spec.VMM.BootArgs = strings.Replace(image.BootArgs, " rw", " ro", 1)
	spec.VMM.Drives = []vmm.Drive{{Path: image.RootfsPath, Format: "raw", ReadOnly: true}}
	spec.VMM.NIC = &vmm.NIC{MAC: network.GuestMAC}
	spec.VMM.Channel = true
	return f
}

// A real VM, reached by its agent, by its network, and through port forwards.
func TestRealVM(t *testing.T) {
	t.Parallel()
	f := newRealFixture(t)
	first := listen(t)
	f.opts.Listeners = []io.Closer{first}
	f.opts.Spec.Forwards = []shim.Forward{{Host: netip.MustParseAddrPort(first.Addr().String()), GuestPort: 22}}
	f.opts.Spec.Ready = smolvm.ReadySSH
	launched := f.launch()
	_ = first.Close()
	client, ctx := f.client(), t.Context()
	if launched.Answer.Kernel == "" {
		t.Errorf("answer is %+v", launched.Answer)
	}

	added, err := client.AddForward(ctx, shim.Forward{Host: netip.MustParseAddrPort("127.0.0.1:0"), GuestPort: 22})
	if err != nil {
		t.Fatal(err)
	}
	banners := map[string]func() (net.Conn, error){
		"agent":           func() (net.Conn, error) { return client.DialAgent(ctx) },
		"guest":           func() (net.Conn, error) { return client.DialGuest(ctx, 22) },
		"forward":         func() (net.Conn, error) { return net.Dial("tcp", first.Addr().String()) },
		"another forward": func() (net.Conn, error) { return net.Dial("tcp", added.Host.String()) },
	}
	for name, dial := range banners {
		if got := banner(t, dial); !strings.HasPrefix(got, "SSH-2.0-") {
			t.Errorf("by %s the guest says %q", name, got)
		}
	}
	if conn, err := client.DialGuest(ctx, 23); err == nil {
		t.Error("connected to a port of the guest that is closed")
		_ = conn.Close()
	}
	if err := client.Pause(ctx); err != nil {
		t.Errorf("pause: %v", err)
	}
	if err := client.Resume(ctx); err != nil {
		t.Errorf("resume: %v", err)
	}
	if got := banner(t, banners["agent"]); !strings.HasPrefix(got, "SSH-2.0-") {
		t.Errorf("after a pause the guest says %q", got)
	}
	if err := client.Pause(ctx); err != nil {
		t.Errorf("pause: %v", err)
	}
	f.stop(patience) // of a paused VM
	if record := f.end(launched); record.Exit.Reason != vmm.ExitPowerOff {
		t.Errorf("exit record is %+v", record)
	}
}

// banner is the first line that an SSH server says.
func banner(t *testing.T, dial func() (net.Conn, error)) string {
	t.Helper()
	conn, err := dial()
	if err != nil {
		t.Error(err)
		return ""
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	// The agent waits for its client to speak first; see package wire.
	if _, err := io.WriteString(conn, "SSH-2.0-test\r\n"); err != nil {
		t.Error(err)
	}
	line, _ := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line)
}

// A kernel that panics ends the start at once, with its last words.
func TestRealPanic(t *testing.T) {
	t.Parallel()
	f := newRealFixture(t)
	f.opts.Spec.VMM.Initrd = testenv.Initramfs(t, "echo no more; exit 1\n")
	_, err := shim.Launch(t.Context(), f.opts)
	if err == nil {
		t.Fatal("Launch succeeds")
	}
	for _, text := range []string{"the guest's kernel panicked", "Attempted to kill init", "the console ends with"} {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error is %q, want %q in it", err, text)
		}
	}
}
