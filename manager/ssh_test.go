package manager_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
)

// sshServer answers as an SSH server with a new host key that lets everybody in and
// ends every command with status 0.
func sshServer(t *testing.T, addr string) (stop func()) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	config := &ssh.ServerConfig{NoClientAuth: true}
	config.AddHostKey(signer)
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serveSSH(conn, config)
		}
	}()
	return func() {
		_ = listener.Close()
		<-done
	}
}

// serveSSH serves one connection with one command.
func serveSSH(conn net.Conn, config *ssh.ServerConfig) {
	defer func() { _ = conn.Close() }()
	_, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return // the client did not like our key
	}
	go ssh.DiscardRequests(requests)
	for offered := range channels {
		channel, inner, err := offered.Accept()
		if err != nil {
			return
		}
		for request := range inner {
			_ = request.Reply(request.Type == "exec", nil)
			if request.Type == "exec" {
				_, _ = channel.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
				_ = channel.Close()
			}
		}
	}
}

// What is said of a login is true of each VM alone: it is at its port, with its host key, by
// the data directory's key or one that the VM was given.
func TestLogins(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		t.Skip("there is no ssh client: ", err)
	}
	key := filepath.Join(t.TempDir(), "key")
	if out, err := exec.CommandContext(t.Context(), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	m := openFake(t)
	mustRun(t, m, smolvm.VMConfig{ID: "open", AuthorizedKeys: []string{strings.TrimSpace(string(public))}})
	mustRun(t, m, smolvm.VMConfig{ID: "closed"})
	login := func(id string, replace ...string) (string, error) {
		t.Helper()
		access, err := m.SSH(t.Context(), id, smolvm.SSHOptions{})
		if err != nil {
			t.Fatal(err)
		}
		line := strings.NewReplacer(append(replace, "ssh ", "ssh -F none -o BatchMode=yes ")...).Replace(access.String())
		out, err := exec.CommandContext(t.Context(), "sh", "-c", line+" hostname").CombinedOutput()
		return string(out), err
	}
	for _, id := range []string{"open", "closed"} {
		if out, err := login(id); err != nil || out != id+"\n" {
			t.Errorf("log in to VM %s: %v, %q", id, err, out)
		}
		out, err := login(id, filepath.Join(strings.ReplaceAll(m.DataDir(), "%", "%%"), "keys", "id_ed25519"), key)
		if entered := err == nil; entered != (id == "open") {
			t.Errorf("log in to VM %s by a key of the user's: %v, %q", id, err, out)
		}
	}
	port := func(id string) string { return "-p " + strconv.Itoa(mustGet(t, m, id).Network.SSHHostPort) }
	if out, err := login("open", port("open"), port("closed")); err == nil || !strings.Contains(out, "verification failed") {
		t.Errorf("the host key of another VM is taken: %v, %q", err, out)
	}
	access, err := m.SSH(t.Context(), "open", smolvm.SSHOptions{PublicHost: "vm.example.org", User: "user"})
	if want := "ssh " + port("open") + " user@vm.example.org"; err != nil || access.Public() != want {
		t.Errorf("access is %+v, %v, want public %q", access, err, want)
	}
}

// The host key of a guest with a kernel of its own is learned at the first login, and
// insisted on from then on.
func TestOwnKernelHostKey(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("ssh"); err != nil {
		t.Skip("there is no ssh client: ", err)
	}
	m := openEmpty(t)
	disk := make([]byte, 1<<20)
	copy(disk, "hsqs")
	config := withoutImage(t, "own_kernel")
	config.InitrdPath, config.RootfsPath, config.SSHHostAddr = "", filepath.Join(t.TempDir(), "rootfs"), ownAddr(t)
	if err := os.WriteFile(config.RootfsPath, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	vm := mustCreate(t, m, config)
	addr := hostAddr(smolvm.PortForward{HostAddr: vm.Network.SSHHostAddr, HostPort: vm.Network.SSHHostPort})
	login := func() (string, error) {
		access, err := m.SSH(t.Context(), vm.ID, smolvm.SSHOptions{})
		if err != nil {
			t.Fatal(err)
		}
		// Not what this host's user has set for ssh.
		line := strings.Replace(access.String(), "ssh ", "ssh -F none -o BatchMode=yes ", 1)
		out, err := exec.CommandContext(t.Context(), "sh", "-c", line+" true").CombinedOutput()
		return string(out), err
	}
	stop := sshServer(t, addr)
	for range 2 {
		if out, err := login(); err != nil {
			t.Errorf("log in: %v\n%s", err, out)
		}
	}
	stop()
	defer sshServer(t, addr)()
	if out, err := login(); err == nil || !strings.Contains(out, "HOST IDENTIFICATION HAS CHANGED") {
		t.Errorf("another host key was taken: %v\n%s", err, out)
	}
	if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	checkEmpty(t, filepath.Join(m.DataDir(), "vms"))

	diskless := mustCreate(t, m, withoutImage(t, "diskless"))
	access, err := m.SSH(t.Context(), diskless.ID, smolvm.SSHOptions{})
	if err != nil || !strings.Contains(access.String(), "known_hosts-") {
		t.Errorf("a guest whose key nothing keeps: %q, %v", access.String(), err)
	}
}
