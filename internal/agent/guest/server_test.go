package guest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

func newKey(t *testing.T) (ssh.Signer, ed25519.PrivateKey) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return signer, key
}

// login connects a standard SSH client to a server.
func loginAs(t *testing.T, server *Server, user string, key ssh.Signer, hostKey ssh.PublicKey) (*ssh.Client, error) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go server.Listen(listener)
	client, err := ssh.Dial("tcp", listener.Addr().String(), &ssh.ClientConfig{
		User:            user,
		Auth:            []ssh.AuthMethod{ssh.PublicKeys(key)},
		HostKeyCallback: ssh.FixedHostKey(hostKey),
	})
	if err == nil {
		t.Cleanup(func() { _ = client.Close() })
	}
	return client, err
}

// Only somebody with an authorized key gets in, as a user that there is, and only to
// the guest that has the right host key.
func TestLogin(t *testing.T) {
	host, hostKey := newKey(t)
	friend, _ := newKey(t)
	stranger, _ := newKey(t)
	server := NewServer()
	if _, err := loginAs(t, server, "root", friend, host.PublicKey()); err == nil {
		t.Error("a server without an identity lets somebody in")
	}
	hello := wire.Hello{
		HostKey:        hostKey,
		AuthorizedKeys: [][]byte{friend.PublicKey().Marshal()},
		Env:            map[string]string{"GREETING": "hello"},
	}
	if err := server.SetIdentity(hello); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		user string
		key  ssh.Signer
		host ssh.PublicKey
	}{
		"a stranger":         {"root", stranger, host.PublicKey()},
		"nobody there":       {"no-such-user", friend, host.PublicKey()},
		"another guest's":    {"root", friend, stranger.PublicKey()},
		"a stranger as user": {"nobody", stranger, host.PublicKey()},
	} {
		if _, err := loginAs(t, server, test.user, test.key, test.host); err == nil {
			t.Errorf("%s gets in", name)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("a session as root takes root")
	}
	client, err := loginAs(t, server, "root", friend, host.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	session.Stderr = &errs
	if err := session.Setenv("ASKED", "for"); err != nil {
		t.Fatal(err)
	}
	out, err := session.Output("echo $GREETING $ASKED; echo oops >&2; exit 3")
	exit, ok := errors.AsType[*ssh.ExitError](err)
	if !ok || exit.ExitStatus() != 3 || string(out) != "hello for\n" || errs.String() != "oops\n" {
		t.Errorf("got %q, %q, %v", out, errs.String(), err)
	}
}

func TestSetIdentityErrors(t *testing.T) {
	for name, key := range map[string][]byte{"none": nil, "short": []byte("nonsense")} {
		if err := NewServer().SetIdentity(wire.Hello{HostKey: key}); err == nil || !strings.Contains(err.Error(), "host key") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParsePasswd(t *testing.T) {
	text := "root:x:0:0:root:/root:/bin/sh\nbroken\nbad:x:abc:0::/:/bin/sh\nbare:x:7:8:::\nuser:x:1000:1001:a,b:/home/user:/bin/ash\n"
	for name, want := range map[string]account{
		"root": {name: "root", home: "/root", shell: "/bin/sh"},
		"bare": {name: "bare", uid: 7, gid: 8, home: "/", shell: "/bin/sh"},
		"user": {name: "user", uid: 1000, gid: 1001, home: "/home/user", shell: "/bin/ash"},
	} {
		if got, ok := parsePasswd(strings.NewReader(text), name); !ok || got != want {
			t.Errorf("%s is %+v, %v", name, got, ok)
		}
	}
	for _, name := range []string{"broken", "bad", "x", ""} {
		if got, ok := parsePasswd(strings.NewReader(text), name); ok {
			t.Errorf("%q is %+v", name, got)
		}
	}
	if got := parseGroups(strings.NewReader("a:x:1:u,v\nb:x:2:v\nc:x:bad:u\nd:x:3:u\n"), "u"); !slices.Equal(got, []uint32{1, 3}) {
		t.Errorf("groups are %v", got)
	}
}

func FuzzParsePasswd(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/sh\n", "root")
	f.Fuzz(func(t *testing.T, text, name string) {
		if got, ok := parsePasswd(strings.NewReader(text), name); ok && got.name != name {
			t.Errorf("asked for %q, got %q", name, got.name)
		}
	})
}

func TestLastWins(t *testing.T) {
	got := lastWins([]string{"A=1", "B=2", "nonsense", "A=3", "=x"})
	if !slices.Equal(got, []string{"A=3", "B=2"}) {
		t.Errorf("got %q", got)
	}
}

func TestParseCmdline(t *testing.T) {
	got := parseCmdline("console=ttyS0 quiet root=/dev/vda init=/sbin/init x=a=b\n")
	for name, want := range map[string]string{"console": "ttyS0", "quiet": "1", "root": "/dev/vda", "init": "/sbin/init", "x": "a=b", "none": ""} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
}

// A hello's files are written, again and again, and leave what is not theirs.
func TestIdentityFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	hosts := filepath.Join(dir, "etc/hosts")
	if err := os.WriteFile(hosts, []byte("127.0.0.1\tlocalhost\n10.0.0.1\tmine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// Often a link to where nothing is yet.
	if err := os.Symlink("../run/nowhere/resolv.conf", filepath.Join(dir, "etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	servers := []netip.Addr{netip.MustParseAddr("10.0.2.2")}
	for name, resolver := range map[string]struct {
		search []string
		want   string
	}{
		"first":  {[]string{"corp.example", "lab.example"}, "nameserver 10.0.2.2\nsearch corp.example lab.example\n"},
		"second": {nil, "nameserver 10.0.2.2\n"},
	} {
		hello := wire.Hello{Hostname: name, MachineID: strings.Repeat("a", 32),
			Network: &wire.Network{DNS: servers, Search: resolver.search}}
		if err := (identityFiles{root: dir}).write(hello); err != nil {
			t.Fatal(err)
		}
		for file, want := range map[string]string{
			"etc/hostname":    name + "\n",
			"etc/resolv.conf": resolver.want,
			"etc/machine-id":  strings.Repeat("a", 32) + "\n",
			"etc/hosts":       "127.0.0.1\tlocalhost\n10.0.0.1\tmine\n127.0.1.1\t" + name + "\t# smolvm\n",
		} {
			if got, err := os.ReadFile(filepath.Join(dir, file)); err != nil || string(got) != want {
				t.Errorf("%s is %q, %v; want %q", file, got, err, want)
			}
		}
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"tool": 0o755, "text": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	env := []string{"PATH=/no/such:" + dir}
	for name, want := range map[string]string{"tool": filepath.Join(dir, "tool"), "./x": "./x", "/a/b": "/a/b", "text": "", "none": ""} {
		got, err := lookPath(name, env, "/")
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s is %q, %v", name, got, err)
		}
	}
}

// A working directory that is missing is made in the root, whatever links are on its way.
func TestMakeWorkingDir(t *testing.T) {
	outside := t.TempDir()
	for name, test := range map[string]struct {
		dir  string
		made string // in the root; empty: nothing
		ok   bool
	}{
		"missing":                {"/a/b/c", "a/b/c", true},
		"there":                  {"/there", "there", true},
		"partly there":           {"/there/more", "there/more", true},
		"a link in the root":     {"/link/more", "there/more", true},
		"a link out of the root": {"/out/more", "", false},
		"a link to above":        {"/above/more", "more", true},
		"a link to nowhere":      {"/nowhere/more", "", false},
		"a file on its way":      {"/file/more", "", true}, // the command's start says it
		"dots":                   {"/../../d/./e", "d/e", true},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			links := map[string]string{"link": "there", "out": outside, "above": "../../..", "nowhere": "no/such"}
			for name, to := range links {
				if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(os.Mkdir(filepath.Join(root, "there"), 0o700), os.WriteFile(filepath.Join(root, "file"), nil, 0o600)); err != nil {
				t.Fatal(err)
			}
			if err := makeWorkingDir(root, test.dir); (err == nil) != test.ok {
				t.Errorf("it ends with %v", err)
			}
			if test.made != "" {
				info, err := os.Stat(filepath.Join(root, test.made))
				if err != nil || !info.IsDir() || test.made != "there" && info.Mode().Perm() != 0o755 {
					t.Errorf("the directory is %v (%v)", info, err)
				}
			}
			if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
				t.Errorf("outside of the root is %v (%v)", left, err)
			}
		})
	}
}
