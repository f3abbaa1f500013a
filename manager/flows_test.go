package manager_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/manager"
)

// flowsOf returns what is in a VM's flow log, and what is wrong with it.
func flowsOf(t *testing.T, m *manager.Manager, id string) ([]smolvm.FlowRecord, error) {
	t.Helper()
	var all []smolvm.FlowRecord
	for record, err := range m.Flows(t.Context(), id, smolvm.FlowOptions{}) {
		if err != nil {
			return all, err
		}
		all = append(all, record)
	}
	return all, nil
}

// awaitFlows follows a VM's flow log until a record is as it is to be.
func awaitFlows(t *testing.T, m *manager.Manager, id string, found func(smolvm.FlowRecord) bool) smolvm.FlowRecord {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var seen []string
	for record, err := range m.Flows(ctx, id, smolvm.FlowOptions{Follow: true}) {
		if err != nil {
			t.Fatalf("%v; the log has\n%s", err, strings.Join(seen, "\n"))
		}
		if found(record) {
			return record
		}
		seen = append(seen, record.Line)
	}
	t.Fatalf("the log has no such record, but\n%s", strings.Join(seen, "\n"))
	return smolvm.FlowRecord{}
}

// kinds returns the kinds and events of records.
func kinds(all []smolvm.FlowRecord) []string {
	var kinds []string
	for _, r := range all {
		kinds = append(kinds, strings.TrimSuffix(string(r.Kind)+" "+string(r.Event), " "))
	}
	return kinds
}

// What is done in a VM is recorded on the host, in a log that goes on from run to run, is kept when
// the VM stops, tells of changes, and is removed with the VM.
func TestFlows(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	ctx := t.Context()
	vm := mustRun(t, m, smolvm.VMConfig{Egress: &smolvm.EgressPolicy{Default: smolvm.EgressDeny}})
	status, err := m.Exec(ctx, vm.ID, smolvm.Command{Args: []string{"sh", "-c", "exit 3"}, User: "root", Dir: "/"})
	if err != nil || status.Code != 3 || status.EgressRevision != 1 {
		t.Errorf("a command: %+v, %v", status, err)
	}
	run := awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool { return r.Kind == smolvm.FlowExec && r.Event == smolvm.FlowClose })
	if run.ExitCode == nil || *run.ExitCode != 3 || !slices.Equal(run.Args, []string{"sh", "-c", "exit 3"}) || run.User != "root" || run.Dir != "/" || run.Duration <= 0 {
		t.Errorf("the record of the command is %s", run.Line)
	}
	// One whose words are no text, and that has secrets in its environment.
	odd := smolvm.Command{Args: []string{"echo", "a\xff\x1b[2J"}, Env: []string{"TOKEN=hush\xff"}}
	if _, err := m.Exec(ctx, vm.ID, odd); err != nil {
		t.Error(err)
	}
	run = awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool {
		return r.Kind == smolvm.FlowExec && r.Event == smolvm.FlowClose && r.Args[0] == "echo"
	})
	if len(run.Args) != 2 || run.Args[1] != `a\xff\x1b[2J` || strings.Contains(run.Line, "hush") {
		t.Errorf("the record of a command with odd words is %s", run.Line)
	}
	if _, err := m.SetEgress(ctx, vm.ID, smolvm.EgressPolicy{Default: smolvm.EgressDNSOnly}); err != nil {
		t.Fatal(err)
	}
	process, err := m.StartProcess(ctx, vm.ID, smolvm.Command{Args: []string{"true"}})
	if err != nil {
		t.Fatal(err)
	}
	if status, err := process.Wait(ctx); err != nil || status.EgressRevision != 2 {
		t.Errorf("a process: %+v, %v", status, err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.CopyTo(ctx, vm.ID, file, "/root/there"); err != nil {
		t.Fatal(err)
	}
	if err := m.CopyFrom(ctx, vm.ID, "/root/there", file); err != nil {
		t.Fatal(err)
	}
	awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool {
		return r.Kind == smolvm.FlowCopyOut && r.Event == smolvm.FlowClose && r.Path == "/root/there" && r.SentBytes >= 5
	})
	if conn, err := m.Dial(ctx, vm.ID, "tcp", "127.0.0.1:22"); err == nil {
		_ = conn.Close()
	}
	awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool { return r.Kind == smolvm.FlowDial && r.Address == "127.0.0.1:22" })
	greet(t, filepath.Join(filepath.Dir(vm.SocketPath), "agent"))
	awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool { return r.Kind == smolvm.FlowSSH && r.Event == smolvm.FlowClose })
	forwarded, err := net.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(vm.Network.SSHHostPort)).String())
	if err != nil {
		t.Fatal(err)
	}
	_ = forwarded.Close()
	awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool {
		return r.Kind == smolvm.FlowForward && r.Port == 22 && r.Address == forwarded.LocalAddr().String()
	})

	// Another run goes on with the log.
	if _, err := m.Stop(ctx, vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	first, err := flowsOf(t, m, vm.ID)
	if err != nil {
		t.Fatal(err)
	}
	got := kinds(first)
	for _, want := range []string{"start", "exec open", "exec close", "policy", "copy-in open", "copy-in close", "copy-out close", "dial close", "stop"} {
		if !slices.Contains(got, want) {
			t.Errorf("there is no %q in %q", want, got)
		}
	}
	if got[0] != "start" || first[0].EgressRevision != 1 || got[len(got)-1] != "stop" {
		t.Errorf("the run is %q", got)
	}
	if _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool { return r.Kind == smolvm.FlowStart && r.Number == int64(len(first))+1 })
	if _, err := m.Stop(ctx, vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}

	path := filepath.Join(m.DataDir(), "vms", vm.ID, "flows.jsonl")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(text, []byte("exit 3"), []byte("exit 0"), 1)
	if err := os.WriteFile(path, changed, 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := flowsOf(t, m, vm.ID)
	if !errors.Is(err, smolvm.ErrFlowLogChanged) || len(before) != 1 || smolvm.CodeOf(err) != smolvm.CodeFlowLogChanged {
		t.Errorf("a log that was changed has %d records, %v", len(before), err)
	}
	if _, err := m.LearnEgress(ctx, vm.ID, smolvm.LearnOptions{}); !errors.Is(err, smolvm.ErrFlowLogChanged) {
		t.Errorf("learn from a log that was changed: %v", err)
	}
	if err := m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the log of a VM that was removed: %v", err)
	}
	if _, err := flowsOf(t, m, vm.ID); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("flows of no VM: %v", err)
	}
}

// greet begins an SSH connection over the guest channel, as other clients than smolvm do.
func greet(t *testing.T, socket string) {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	// Whether it is let in does not matter.
	_, _, _, _ = ssh.NewClientConn(conn, "guest", &ssh.ClientConfig{User: "root", HostKeyCallback: ssh.InsecureIgnoreHostKey()})
}

// A VM of a pool records what its user does, and not what it did while it stood by.
func TestFlowsOfPool(t *testing.T) {
	t.Parallel()
	m := openFakeFast(t)
	pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.RemovePool(t.Context(), pool.ID); err != nil {
			t.Error(err)
		}
	}()
	vm := mustRun(t, m, smolvm.VMConfig{})
	if vm.Start.Method != smolvm.StartPool {
		t.Errorf("it was started by %q", vm.Start.Method)
	}
	sh(t, m, vm.ID, "true")
	awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool { return r.Kind == smolvm.FlowExec && r.Event == smolvm.FlowClose })
	all, err := flowsOf(t, m, vm.ID)
	if err != nil || all[0].Kind != smolvm.FlowStart || all[0].Number != 1 || !strings.HasPrefix(strings.Join(kinds(all[1:]), ","), "exec open") {
		t.Errorf("the log has %q, %v", kinds(all), err)
	}
}

// The flows of a real guest are recorded, with what became of them, and a policy that is learned
// of them allows them.
func TestFlowsOfRealGuest(t *testing.T) {
	t.Parallel()
	m := openFast(t)
	at := serveWelcome(t)
	addr := at.Addr()
	policy := smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{fmt.Sprintf("allow @host:%d/tcp", at.Port())}}
	vm := mustRun(t, m, smolvm.VMConfig{Egress: &policy})
	if got := sh(t, m, vm.ID, fmt.Sprintf("echo hello | nc %s %d", addr, at.Port())); got != "welcome" {
		t.Errorf("connected, the guest got %q", got)
	}
	sh(t, m, vm.ID, "nc 203.0.113.1 80 </dev/null 2>&1 || true; nslookup bad.example 2>&1 || true")
	done := awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool { return r.Kind == smolvm.FlowTCP && r.Event == smolvm.FlowClose })
	if done.Address != at.String() || done.Place != "host" || done.SentBytes != 6 || done.ReceivedBytes != 8 ||
		done.Verdict != smolvm.FlowAllowed || done.Rule != policy.Rules[0] || done.EgressRevision != 1 {
		t.Errorf("a connection was recorded as %s", done.Line)
	}
	awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool {
		return r.Event == smolvm.FlowDeny && r.Address == "203.0.113.1:80" && r.Verdict == smolvm.FlowDenied && r.Reason == "denied by default"
	})
	awaitFlows(t, m, vm.ID, func(r smolvm.FlowRecord) bool {
		return r.Kind == smolvm.FlowDNS && r.Name == "bad.example" && r.Result == "nxdomain" && r.Verdict == smolvm.FlowDenied
	})
	learned, err := m.LearnEgress(t.Context(), vm.ID, smolvm.LearnOptions{})
	if err != nil || !slices.Equal(learned.Policy.Rules, policy.Rules) {
		t.Errorf("learned %+v, %v", learned, err)
	}
	if learned, err = m.LearnEgress(t.Context(), vm.ID, smolvm.LearnOptions{Denied: true}); err != nil ||
		!slices.Contains(learned.Policy.Rules, "allow 203.0.113.1:80/tcp") {
		t.Errorf("with what was denied, learned %+v, %v", learned, err)
	}
	// A shim that is killed leaves a log that can be read, and gone on with.
	info, err := m.Get(t.Context(), vm.ID)
	if err != nil {
		t.Fatal(err)
	}
	killShim(t, info)
	if _, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if all, err := flowsOf(t, m, vm.ID); err != nil || strings.Count(strings.Join(kinds(all), " "), "start") != 2 {
		t.Errorf("after its shim was killed: %q, %v", kinds(all), err)
	}
}

// killShim kills a VM's shim, and returns when it is gone.
func killShim(t *testing.T, vm smolvm.VMInfo) {
	t.Helper()
	process, err := os.FindProcess(vm.ShimPID)
	if err == nil {
		err = process.Kill()
	}
	if err != nil {
		t.Fatal(err)
	}
	client := shim.NewClient(filepath.Dir(vm.SocketPath))
	for {
		if _, err := client.Status(t.Context()); errors.Is(err, shim.ErrGone) {
			return
		}
	}
}
