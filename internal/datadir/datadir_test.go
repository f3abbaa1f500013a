package datadir

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/stream"
)

func mustOpen(t *testing.T, path string) *Dir {
	t.Helper()
	d, err := Open(Options{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// settle gives a directory its identity, and returns how often it had to forget what ran.
func settle(t *testing.T, d *Dir, former string) (forgotten int) {
	t.Helper()
	err := d.Settle(t.Context(), Arrival{Former: former, Forget: func() error { forgotten++; return nil }})
	if err != nil || len(d.ID()) != idDigits {
		t.Fatalf("Settle: id %q, %v", d.ID(), err)
	}
	return forgotten
}

// A directory is the same by any name and after it was renamed, and a copy is not
// (cases 21, 24, 25).
func TestIdentity(t *testing.T) {
	work := t.TempDir()
	at := func(name string) string { return filepath.Join(work, name) }
	d := mustOpen(t, at("data"))
	if n := settle(t, d, ""); n != 0 {
		t.Error("a new directory forgets what runs")
	}
	id := d.ID()

	if err := os.Symlink("data", at("link")); err != nil {
		t.Fatal(err)
	}
	link := mustOpen(t, at("link"))
	if link.ID() != id || link.Root() != d.Root() || link.Disk("web", "qcow2") != filepath.Join(d.Root(), "disks", "web.qcow2") {
		t.Errorf("by a link it is %s at %s, not %s at %s", link.ID(), link.Root(), id, d.Root())
	}
	t.Chdir(work)
	if relative := mustOpen(t, "data"); relative.ID() != id || relative.Root() != d.Root() {
		t.Errorf("by a relative path it is %s at %s", relative.ID(), relative.Root())
	}

	if out, err := exec.Command("cp", "-a", at("data"), at("copy")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := mustOpen(t, at("copy"))
	if c.ID() != "" {
		t.Errorf("a copy has an identity before it was settled: %s", c.ID())
	}
	failed := errors.New("disk full")
	if err := c.Settle(t.Context(), Arrival{Forget: func() error { return failed }}); !errors.Is(err, failed) || c.ID() != "" {
		t.Errorf("a copy that can't forget: id %q, %v", c.ID(), err)
	}
	if n := settle(t, c, ""); n != 1 || c.ID() == id {
		t.Errorf("a copy forgets %d times, and is %s", n, c.ID())
	}
	if again := mustOpen(t, at("copy")); again.ID() != c.ID() || settle(t, again, "") != 0 {
		t.Errorf("a copy that was settled is %s, not %s", again.ID(), c.ID())
	}
	if original := mustOpen(t, at("data")); original.ID() != id {
		t.Errorf("the original is %s, not %s", original.ID(), id)
	}

	if err := os.Rename(at("data"), at("renamed")); err != nil {
		t.Fatal(err)
	}
	if renamed := mustOpen(t, at("renamed")); renamed.ID() != id || settle(t, renamed, "") != 0 {
		t.Errorf("after a rename it is %s, not %s", renamed.ID(), id)
	}
}

// A directory of a version that kept no identity goes on with the name by which its VMs
// that run have their sockets, unless it is a copy.
func TestFormerDirectories(t *testing.T) {
	work := t.TempDir()
	at := func(name string) string { return filepath.Join(work, name) }
	stayed := mustOpen(t, at("stayed"))
	if n := settle(t, stayed, at("stayed")); n != 0 || stayed.ID() != shortHash(at("stayed")) {
		t.Errorf("one that stayed where it was forgets %d times, and is %s", n, stayed.ID())
	}
	moved := mustOpen(t, at("moved"))
	if n := settle(t, moved, at("gone")); n != 0 || moved.ID() != shortHash(at("gone")) {
		t.Errorf("one that was renamed forgets %d times, and is %s", n, moved.ID())
	}
	copied := mustOpen(t, at("copied"))
	if n := settle(t, copied, at("stayed")); n != 1 || copied.ID() == stayed.ID() {
		t.Errorf("a copy forgets %d times, and is %s", n, copied.ID())
	}
}

// Of many that open a copy at once, one settles it.
func TestSettleAtTheSameTime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data")
	mustOpen(t, path)
	var all sync.WaitGroup
	ids := make([]string, 20)
	for i := range ids {
		all.Go(func() {
			d, err := Open(Options{Path: path})
			if err == nil {
				err = d.Settle(context.Background(), Arrival{Forget: func() error { return nil }})
			}
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = d.ID()
		})
	}
	all.Wait()
	for _, id := range ids {
		if id != ids[0] || id == "" {
			t.Fatalf("one directory has the identities %q", ids)
		}
	}
}

func TestDamagedIdentity(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data")
	settle(t, mustOpen(t, path), "")
	for _, text := range []string{"", "{}", "nonsense", `{"id": "short"}`} {
		if err := os.WriteFile(filepath.Join(path, identityName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Options{Path: path}); err == nil || !strings.Contains(err.Error(), identityName+" is damaged") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// A directory that a newer program has laid out is refused, and stays as it is.
func TestNewerIdentity(t *testing.T) {
	root := filepath.Join(t.TempDir(), "data")
	settle(t, mustOpen(t, root), "")
	path := filepath.Join(root, identityName)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	newer := strings.Replace(string(text), fmt.Sprintf(`"format": %d`, identityFormat), fmt.Sprintf(`"format": %d`, identityFormat+1), 1)
	if err := os.WriteFile(path, []byte(newer), 0o600); err != nil || newer == string(text) {
		t.Fatalf("%v: %s", err, newer)
	}
	if _, err := Open(Options{Path: root}); !errors.Is(err, smolvm.ErrUnsupported) {
		t.Errorf("Open: %v", err)
	}
	if now, err := os.ReadFile(path); err != nil || string(now) != newer {
		t.Errorf("it has changed: %s, %v", now, err)
	}
}

// Nobody uses a directory of somebody else, nor one that others can change (S11, 30).
func TestForeignDirectories(t *testing.T) {
	work := t.TempDir()
	for name, test := range map[string]struct {
		mode  os.FileMode
		owner int
		want  string
	}{
		"of another user":           {0o700, 65534, "belongs to user"},
		"for the group to write to": {0o770, os.Getuid(), "can be written to by others"},
		"for all to write to":       {0o777, os.Getuid(), "can be written to by others"},
		"for all to put things in":  {0o777 | os.ModeSticky, os.Getuid(), "can be written to by others"},
		"for others to read":        {0o755, os.Getuid(), ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(work, name)
			err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, test.mode), os.Chown(dir, test.owner, -1))
			if err != nil {
				t.Skip(err)
			}
			check := func(what string, err error) {
				t.Helper()
				if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
					t.Errorf("%s: %v, want %q", what, err, test.want)
				}
			}
			_, err = Open(Options{Path: dir})
			check("a data directory", err)
			if entries, _ := os.ReadDir(dir); test.want != "" && len(entries) != 0 {
				t.Errorf("%d files were made in it", len(entries))
			}
			check("a socket directory", MakeRuntimeParent(filepath.Join(dir, "vm")))
			t.Setenv("XDG_RUNTIME_DIR", dir)
			sockets, err := LocateSockets("")
			if want := map[bool]string{true: filepath.Join(dir, "smolvm"), false: privateTempDir()}[test.want == ""]; err != nil || sockets != want {
				t.Errorf("sockets are in %s (%v), not in %s", sockets, err, want)
			}
		})
	}
}

// Where VMs are does not depend on the working directory, nor on whether somebody has
// looked for them (A5).
func TestLocate(t *testing.T) {
	work := t.TempDir()
	t.Chdir(work)
	home, state := filepath.Join(work, "home"), filepath.Join(work, "state")
	for name, test := range map[string]struct{ data, state, home, want string }{
		"the environment": {filepath.Join(work, "env"), state, home, filepath.Join(work, "env")},
		"XDG":             {"", state, home, filepath.Join(state, "smolvm")},
		"a relative XDG":  {"", "state", home, filepath.Join(home, ".local", "state", "smolvm")},
		"the home":        {"", "", home, filepath.Join(home, ".local", "state", "smolvm")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(dataDirEnv, test.data)
			t.Setenv("XDG_STATE_HOME", test.state)
			t.Setenv("HOME", test.home)
			if _, err := Open(Options{Existing: true}); !errors.Is(err, ErrMissing) {
				t.Errorf("one that is not there: %v", err)
			}
			if entries, _ := os.ReadDir(work); len(entries) != 0 {
				t.Errorf("to look for it made %s", entries[0].Name())
			}
			d, err := Open(Options{})
			if err != nil || d.Root() != test.want || d.Note() != "" {
				t.Fatalf("it is %+v, %v; want %s", d, err, test.want)
			}
			if err := os.WriteFile(d.Database(), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if again, err := Open(Options{Existing: true}); err != nil || again.Root() != test.want {
				t.Errorf("one that is there: %v", err)
			}
			for _, made := range []string{"env", "state", "home"} {
				if err := os.RemoveAll(filepath.Join(work, made)); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	t.Setenv("XDG_STATE_HOME", "")
	t.Setenv("HOME", "relative")
	if got := userDataDir(); got != "" {
		t.Errorf("a relative home gives %s", got)
	}
	t.Setenv("HOME", "")
	if got := userDataDir(); os.Getuid() == 0 && got != "/root/.local/state/smolvm" {
		t.Errorf("without a home in the environment root has %q", got)
	}
}

func TestRuntimeDirIsShort(t *testing.T) {
	d := mustOpen(t, filepath.Join(t.TempDir(), "data"))
	settle(t, d, "")
	short := d.Runtime("/run/smolvm", "web", len("agent"))
	if short != "/run/smolvm/web-"+d.ID()[:8] {
		t.Errorf("sockets are in %s", short)
	}
	long := d.Runtime("/run/"+strings.Repeat("long/", 20), "web", len("agent"))
	if len(long)+len("/agent") > stream.MaxSocketPath || filepath.Dir(long) != privateTempDir() {
		t.Errorf("sockets are in %s", long)
	}
}
