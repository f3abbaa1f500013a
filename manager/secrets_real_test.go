package manager_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// secretHost is the name of the server that gets the secret.
const secretHost = "api.secret.example"

// secretServer is a server on an address of the host's that knows a token.
type secretServer struct {
	addr    netip.AddrPort
	granted atomic.Int64
}

// newSecretServer starts a server that grants what it is asked for by the token only, with a
// certificate by an authority that is written to a file.
func newSecretServer(t *testing.T, token, authorityFile string) *secretServer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "the outside's authority"}, DNSNames: []string{secretHost},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(authorityFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp4", netip.AddrPortFrom(testenv.HostAddress(t), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	s := &secretServer{addr: netip.MustParseAddrPort(listener.Addr().String())}
	server := &http.Server{
		ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "Bearer "+token {
				http.Error(w, "who are you?", http.StatusUnauthorized)
				return
			}
			s.granted.Add(1)
			_, _ = fmt.Fprintln(w, "welcome")
		}),
	}
	go func() { _ = server.ServeTLS(listener, "", "") }()
	t.Cleanup(func() { _ = server.Close() })
	return s
}

// url is that of the server by its name.
func (s *secretServer) url() string {
	return "https://" + net.JoinHostPort(secretHost, strconv.Itoa(int(s.addr.Port()))) + "/"
}

// config is that of a VM that has the token.
func (s *secretServer) config(source string) smolvm.VMConfig {
	port := s.addr.Port()
	return smolvm.VMConfig{
		MemoryMiB: 128,
		Egress: &smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{
			fmt.Sprintf("allow %s:%d/tcp", secretHost, port), fmt.Sprintf("allow @host:%d/tcp", port),
		}},
		Secrets: []smolvm.Secret{{Name: "API_TOKEN", Source: source, Hosts: []string{net.JoinHostPort(secretHost, strconv.Itoa(int(port)))}}},
	}
}

// A program in a real guest that has only a placeholder gets what the token grants, and the
// token is nowhere in the guest's memory, on its disk, or in what smolvm keeps. Forks and later
// starts have placeholders and an authority of their own.
func TestSecretsOfRealGuest(t *testing.T) {
	token := "token-" + rand.Text()
	authority := filepath.Join(t.TempDir(), "authority.pem")
	server := newSecretServer(t, token, authority)
	t.Setenv("SSL_CERT_FILE", authority) // as the host's authorities, for shims
	t.Setenv("SMOLVM_TEST_TOKEN", token)
	m := openReal(t)
	ctx := t.Context()
	vm := mustRun(t, m, server.config("env:SMOLVM_TEST_TOKEN"))
	if len(vm.Start.Warnings) > 0 {
		t.Errorf("it warns: %q", vm.Start.Warnings)
	}
	client := filepath.Join(t.TempDir(), "httpsget")
	if err := os.WriteFile(client, testenv.Build(t, "github.com/smolvm/smolvm/internal/testenv/httpsget"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := m.CopyTo(ctx, vm.ID, client, "/root/httpsget"); err != nil {
		t.Fatal(err)
	}
	sh(t, m, vm.ID, fmt.Sprintf("echo %s %s >> /etc/hosts", server.addr.Addr(), secretHost))
	get := func(id, flags, holder string) string {
		t.Helper()
		return sh(t, m, id, "/root/httpsget "+flags+" "+server.url()+` "`+holder+`" 2>&1 || true`)
	}
	for flags, proto := range map[string]string{"": "HTTP/2.0", "-http1": "HTTP/1.1"} {
		got := get(vm.ID, flags, "$API_TOKEN")
		if !strings.HasPrefix(got, proto+" 200\nCN=smolvm VM authority") || !strings.HasSuffix(got, "\nwelcome") {
			t.Errorf("with the placeholder, by %s: %q", proto, got)
		}
	}
	if got := server.granted.Load(); got != 2 {
		t.Errorf("the server has granted %d requests, want 2", got)
	}
	if got := get(vm.ID, "", "something else"); !strings.Contains(got, " 401\n") {
		t.Errorf("without the placeholder: %q", got)
	}
	holder := sh(t, m, vm.ID, `echo "$API_TOKEN"`)
	// A program that goes on has the placeholder in its memory.
	sh(t, m, vm.ID, `sh -c 'while sleep 1; do :; done' "$API_TOKEN" >/dev/null 2>&1 </dev/null & sync`)
	if _, err := m.CreateSnapshot(ctx, vm.ID, smolvm.SnapshotOptions{Name: "kept"}); err != nil {
		t.Fatal(err)
	}
	if !found(t, m, holder) {
		t.Error("the placeholder is not found, so the search finds nothing")
	}
	if found(t, m, token) || found(t, m, base64.StdEncoding.EncodeToString([]byte("Bearer "+token))) {
		t.Error("the token has been written down")
	}
	for _, pid := range []int{vm.PID, vm.ShimPID} {
		for _, name := range []string{"environ", "cmdline"} {
			if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name)); err != nil || bytes.Contains(text, []byte(token)) {
				t.Errorf("%s of process %d has the token, or can't be read: %v", name, pid, err)
			}
		}
	}

	forked, err := m.Fork(ctx, vm.ID, smolvm.ForkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	child := forked.Children[0].ID
	if other := sh(t, m, child, `echo "$API_TOKEN"`); other == holder || len(other) != len(holder) {
		t.Errorf("a fork has the placeholder %q, and its parent %q", other, holder)
	}
	if got := get(child, "", "$API_TOKEN"); !strings.HasSuffix(got, "\nwelcome") {
		t.Errorf("a fork with its own placeholder: %q", got)
	}
	if got := get(child, "", holder); !strings.Contains(got, " 401\n") {
		t.Errorf("a fork with its parent's placeholder: %q", got)
	}
	if one, other := sh(t, m, vm.ID, "cat $NODE_EXTRA_CA_CERTS"), sh(t, m, child, "cat $NODE_EXTRA_CA_CERTS"); one == other {
		t.Error("a fork has its parent's authority")
	}
	if got := sh(t, m, child, "grep -c BEGIN $SSL_CERT_FILE"); got != "1" {
		t.Errorf("a fork trusts %s authorities", got)
	}

	if forked, err = m.Fork(ctx, vm.ID, smolvm.ForkOptions{WithoutSecrets: true}); err != nil {
		t.Fatal(err)
	}
	without := forked.Children[0].ID
	if got := get(without, "-insecure", holder); !strings.Contains(got, " 401\nCN=the outside's authority\n") {
		t.Errorf("a fork without the secret: %q", got)
	}
	if got := sh(t, m, without, `echo "$API_TOKEN$SSL_CERT_FILE"; ls /etc/ssl/smolvm-authority.pem 2>&1 || true`); !strings.HasSuffix(got, "No such file or directory") || strings.Contains(got, "smolvm_secret_") {
		t.Errorf("a fork without the secret has of it %q", got)
	}

	if _, err := m.Stop(ctx, vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := os.Unsetenv("SMOLVM_TEST_TOKEN"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); err == nil || !strings.Contains(err.Error(), "SMOLVM_TEST_TOKEN is not set") || smolvm.HintOf(err) == "" {
		t.Errorf("a start without the variable: %v", err)
	}
	t.Setenv("SMOLVM_TEST_TOKEN", token)
	if _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	sh(t, m, vm.ID, fmt.Sprintf("grep -q %s /etc/hosts || echo %s %s >> /etc/hosts", secretHost, server.addr.Addr(), secretHost))
	if got := get(vm.ID, "", "$API_TOKEN"); !strings.HasSuffix(got, "\nwelcome") {
		t.Errorf("after another start: %q", got)
	}
	if found(t, m, token) {
		t.Error("the token has been written down since")
	}
	if err := m.RemoveSnapshot(ctx, "kept"); err != nil {
		t.Error(err)
	}
}

// found reports whether a text is in any file of a Manager: the database, logs, disks, saved
// memory.
func found(t *testing.T, m *manager.Manager, text string) bool {
	t.Helper()
	has := false
	err := filepath.WalkDir(m.DataDir(), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		in, err := hasText(path, text)
		has = has || in
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return has
}

// hasText reports whether a file, which may be large and sparse, has a text in it.
func hasText(path, text string) (bool, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // it is gone since
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = file.Close() }()
	buffer := make([]byte, 1<<20)
	kept := 0
	for {
		n, err := file.Read(buffer[kept:])
		if bytes.Contains(buffer[:kept+n], []byte(text)) {
			return true, nil
		}
		if err == io.EOF {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		end := kept + n
		kept = min(len(text), end)
		copy(buffer, buffer[end-kept:end])
	}
}
