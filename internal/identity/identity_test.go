package identity

import (
	"crypto/ed25519"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// told returns what a guest of a VM was told, and what it says when it has become that.
func told(t *testing.T) (wire.Hello, wire.Identity) {
	t.Helper()
	key, err := NewHostKey("vm-1")
	if err != nil {
		t.Fatal(err)
	}
	client, err := ClientKey(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	hello, err := Guest{
		Hostname: "vm-1", MachineID: NewMachineID(), HostKey: key, Network: &wire.Network{MAC: "02:00:ac:10:00:02"},
	}.Hello(client.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	hello.BootID = NewBootID()
	public, err := PublicHostKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return *hello, wire.Identity{
		Hostname: hello.Hostname, MachineID: hello.MachineID, HostKey: ssh.FingerprintSHA256(public),
		BootID: hello.BootID, MAC: hello.Network.MAC, Random: "8f0e",
	}
}

func TestVerify(t *testing.T) {
	t.Parallel()
	all := []string{"hostname", "machine-id", "SSH host key", "boot id", "MAC", "random numbers"}
	tests := []struct {
		name   string
		change func(*wire.Identity)
		booted bool
		want   []string // nil: an error
		err    string
	}{
		{name: "all agrees", change: func(*wire.Identity) {}, want: all},
		{name: "hostname", change: func(i *wire.Identity) { i.Hostname = "vm-2" }, err: `hostname is "vm-2", not "vm-1"`},
		{name: "machine id", change: func(i *wire.Identity) { i.MachineID = "00" }, err: "machine-id"},
		{name: "no machine id", change: func(i *wire.Identity) { i.MachineID = "" }, err: "machine-id"},
		{name: "host key", change: func(i *wire.Identity) { i.HostKey = "SHA256:x" }, err: "SSH host key"},
		{name: "boot id of a clone", change: func(i *wire.Identity) { i.BootID = NewBootID() }, err: "boot id"},
		{
			name: "boot id of a boot", change: func(i *wire.Identity) { i.BootID = NewBootID() }, booted: true,
			want: slices.DeleteFunc(slices.Clone(all), func(s string) bool { return s == "boot id" }),
		},
		{name: "MAC", change: func(i *wire.Identity) { i.MAC = "02:00:ac:10:00:03" }, err: "MAC"},
		{
			name: "no interface", change: func(i *wire.Identity) { i.MAC = "" },
			want: slices.DeleteFunc(slices.Clone(all), func(s string) bool { return s == "MAC" }),
		},
		{name: "no random numbers", change: func(i *wire.Identity) { i.Random = "" }, err: "random numbers"},
	}
	hello, said := told(t)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			said := said
			test.change(&said)
			got, err := Verify(hello, said, !test.booted)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error is %v, want one that names %q", err, test.err)
				}
				return
			}
			if err != nil || !slices.Equal(got, test.want) {
				t.Errorf("verified %v, %v; want %v", got, err, test.want)
			}
		})
	}
}

func TestHelloRefusesKeys(t *testing.T) {
	t.Parallel()
	client, err := ClientKey(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	good, err := NewHostKey("vm-1")
	if err != nil {
		t.Fatal(err)
	}
	line := string(ssh.MarshalAuthorizedKey(client.PublicKey()))
	for name, test := range map[string]struct {
		guest Guest
		want  string // empty: it is fine
	}{
		"good":          {Guest{HostKey: good, AuthorizedKeys: []string{line}}, ""},
		"no host key":   {Guest{}, "host key"},
		"no key":        {Guest{HostKey: good, AuthorizedKeys: []string{"ssh-ed25519"}}, "OpenSSH"},
		"with options":  {Guest{HostKey: good, AuthorizedKeys: []string{`command="true" ` + line}}, "not supported"},
		"several lines": {Guest{HostKey: good, AuthorizedKeys: []string{line, "x"}}, "OpenSSH"},
	} {
		hello, err := test.guest.Hello(client.PublicKey())
		if test.want != "" {
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: error is %v, want one that names %q", name, err, test.want)
			}
			continue
		}
		if err != nil || len(hello.AuthorizedKeys) != 2 {
			t.Errorf("%s: %d keys may log in, %v; want those of the client and of the line", name, len(hello.AuthorizedKeys), err)
		}
	}
}

// Of many that want a directory's key at once, all get the same one, and nobody else can
// read it.
func TestClientKeyIsOne(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "keys")
	keys := make([]string, 16)
	var all sync.WaitGroup
	for i := range keys {
		all.Go(func() {
			signer, err := ClientKey(dir)
			if err != nil {
				t.Error(err)
				return
			}
			keys[i] = ssh.FingerprintSHA256(signer.PublicKey())
		})
	}
	all.Wait()
	if slices.Compact(slices.Clone(keys))[0] != keys[0] || len(slices.Compact(keys)) != 1 {
		t.Errorf("keys are %v, want one", keys)
	}
	info, err := os.Stat(ClientKeyPath(dir))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key's mode is %v, %v; want 0600", info.Mode(), err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("the directory has %v, %v; want a key and its public half", entries, err)
	}
	if err := os.WriteFile(ClientKeyPath(dir), []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ClientKey(dir); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("error for a damaged key is %v", err)
	}
}

func TestPlaceholdersDiffer(t *testing.T) {
	t.Parallel()
	a, errA := Placeholder(nil)
	b, errB := Placeholder(nil)
	if errA != nil || errB != nil {
		t.Fatal(errA, errB)
	}
	if a.MachineID == b.MachineID || a.BootID == b.BootID || ed25519.PrivateKey(a.HostKey).Equal(ed25519.PrivateKey(b.HostKey)) {
		t.Errorf("two placeholders share something: %+v, %+v", a, b)
	}
	if len(a.AuthorizedKeys) > 0 {
		t.Error("somebody may log in to a placeholder")
	}
}
