package manager_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
)

// serveWelcome serves who connects to an address of the host's, with a word and nothing else, and
// returns where.
func serveWelcome(t *testing.T) netip.AddrPort {
	t.Helper()
	listener, err := net.Listen("tcp4", netip.AddrPortFrom(testenv.HostAddress(t), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				_, _ = io.WriteString(conn, "welcome\n")
				_, _ = io.Copy(io.Discard, conn)
			}()
		}
	}()
	return listener.Addr().(*net.TCPAddr).AddrPort()
}

// A real guest is held to its policy, from its start on, and as soon as it is changed. It
// connects to the host itself, by an address of the host's, so nothing leaves the host.
func TestEgressOfRealGuest(t *testing.T) {
	t.Parallel()
	m := openFast(t)
	at := serveWelcome(t)
	addr, port := at.Addr(), int(at.Port())
	deny := smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{"allow good.example"}}
	vm := mustRun(t, m, smolvm.VMConfig{Egress: &deny})
	connect := fmt.Sprintf("nc %s %d", addr, port)
	if got := sh(t, m, vm.ID, "echo | "+connect+" 2>&1 || echo refused"); !strings.Contains(got, "refused") {
		t.Errorf("under a policy that denies it: %q", got)
	}
	if got := sh(t, m, vm.ID, "nslookup bad.example 2>&1 || true"); !strings.Contains(got, "NXDOMAIN") {
		t.Errorf("a name that is not allowed: %q", got)
	}
	if got := sh(t, m, vm.ID, "nc 203.0.113.1 80 </dev/null 2>&1 || echo refused"); !strings.Contains(got, "refused") {
		t.Errorf("a raw address: %q", got)
	}
	allow := deny
	allow.Rules = append(allow.Rules, fmt.Sprintf("allow @host:%d/tcp", port))
	if _, err := m.SetEgress(t.Context(), vm.ID, allow); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, vm.ID, "echo | "+connect); got != "welcome" {
		t.Errorf("under a policy that allows it: %q", got)
	}
	// One that is open ends with the policy that allowed it.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	output, stdout := io.Pipe()
	stdin, input := io.Pipe() // with nothing in it
	defer func() { _ = input.Close() }()
	process, err := m.StartProcess(ctx, vm.ID, smolvm.Command{
		Args: []string{"nc", addr.String(), strconv.Itoa(port)}, Stdin: stdin, Stdout: stdout,
	})
	if err != nil {
		t.Fatal(err)
	}
	line := make([]byte, len("welcome\n"))
	if _, err := io.ReadFull(output, line); err != nil || string(line) != "welcome\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if _, err := m.SetEgress(ctx, vm.ID, deny); err != nil {
		t.Fatal(err)
	}
	if _, err := process.Wait(ctx); err != nil {
		t.Errorf("the connection goes on: %v", err)
	}
}
