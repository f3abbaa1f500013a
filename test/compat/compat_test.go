// Package compat holds what COMPATIBILITY.md promises: VMs that one build has made are
// managed by another. It runs the programs as users do, and knows nothing of the code.
package compat_test

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm/internal/testenv"
)

// upgrade is a data directory that two builds use by turns.
type upgrade struct {
	old, new program
	dataDir  string
	work     string // files of the host
	sameDB   bool   // both make the same schema
}

// TestUpgrade makes VMs, a snapshot and a pool with the previous build, manages them with
// this one, and then has the previous one manage what this one has made, or refuse to.
func TestUpgrade(t *testing.T) {
	testenv.RequireQEMU(t)
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	commit := previousCommit(t, root)
	testenv.Images(t) // skips where images can't be made
	u := newUpgrade(t, root, commit)
	t.Cleanup(func() { u.removeAll(t) })

	stages := []struct {
		name string
		run  func(*testing.T)
	}{
		{"the old build makes VMs", u.oldMakes},
		{"the new one sees them as they are", u.newSees},
		{"the new one uses one that runs", u.newUses},
		{"the new one notices that one powers off", u.newNotices},
		{"the new one starts what had stopped", u.newStarts},
		{"the new one goes on from the snapshot", u.newRestores},
		{"the new one makes VMs", u.newMakes},
	}
	if u.sameDB {
		stages = append(stages, struct {
			name string
			run  func(*testing.T)
		}{"the old one manages all of it", u.oldManages})
	} else {
		stages = append(stages, struct {
			name string
			run  func(*testing.T)
		}{"the old one refuses, and nothing is lost", u.oldRefuses})
	}
	for _, stage := range stages {
		// What comes next builds on it.
		if !t.Run(stage.name, stage.run) {
			return
		}
	}
	u.removeAll(t)
	checkEmpty(t, u.dataDir)
}

func newUpgrade(t *testing.T, root, commit string) *upgrade {
	t.Helper()
	// Sockets have short paths.
	dir, err := os.MkdirTemp("", "smolvm-compat-") //nolint:usetesting // a test's own directory has a long name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	u := &upgrade{dataDir: filepath.Join(dir, "data"), work: dir}
	images := filepath.Join(testenv.Cache(t), "compat", "images")
	bin := filepath.Join(dir, "bin")
	for _, path := range []string{u.dataDir, images, bin} {
		if err := os.MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// Images are kept for later runs.
	if err := os.Symlink(images, filepath.Join(u.dataDir, "images")); err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "SMOLVM_BACKEND=", "SMOLVM_TEMPLATES=", "XDG_RUNTIME_DIR="+dir)
	build(t, root, bin, "this")
	u.old = program{"old", buildPrevious(t, root, commit), env}.with(u.dataDir)
	u.new = program{"new", filepath.Join(bin, "smolvm"), env}.with(u.dataDir)
	oldDB, newDB := u.old.schema(t), u.new.schema(t)
	if oldDB > newDB {
		t.Fatalf("the schema of the database has gone back from version %d to %d", oldDB, newDB)
	}
	u.sameDB = oldDB == newDB
	t.Logf("previous build: %.12s, schema %d; this one: schema %d", commit, oldDB, newDB)
	return u
}

// removeAll ends all VMs, and removes all that is kept. It can be called again.
func (u *upgrade) removeAll(t *testing.T) {
	t.Helper()
	p := u.new
	p.run(t, "rm", "--all")
	for _, kind := range []string{"pool", "snapshot"} {
		var things []struct{ ID, Name string }
		out := p.run(t, kind, "ls", "--json")
		if err := json.Unmarshal([]byte(out), &things); err != nil {
			t.Fatalf("%s ls: %v\n%s", kind, err, out)
		}
		for _, thing := range things {
			p.run(t, kind, "rm", thing.ID+thing.Name)
		}
	}
	p.run(t, "template", "prune", "--all")
	p.run(t, "reconcile")
	for _, one := range []program{u.old, u.new} {
		shims := func() []string {
			return append(testenv.Processes(one.path+" shim"), testenv.Processes(one.path+" smolvm-shim")...)
		}
		// A shim may be about to go: its VM is gone already.
		for range 100 {
			if len(shims()) == 0 {
				break
			}
			p.run(t, "events", "--limit", "1") // takes its time
		}
		for _, left := range shims() {
			t.Errorf("left behind: a process of %s: %s", one, left)
		}
	}
}

// oldMakes leaves VMs in every state, a snapshot, and a pool.
func (u *upgrade) oldMakes(t *testing.T) {
	old := u.old
	old.run(t, "image", "build", "--quiet")
	old.run(t, "pool", "set", "--memory", "256M", "1")
	for _, id := range []string{"web", "quits", "halted"} {
		old.run(t, "create", "--memory", "256M", "-e", "COLOR=blue", "--label", "team=red", "--name", id)
		old.run(t, "start", id)
		old.run(t, "exec", id, "--", "sh", "-c", "echo "+id+" >/root/file; sync")
	}
	old.run(t, "create", "--memory", "256M", "--name", "fresh")
	old.run(t, "port", "add", "web", "8099")
	old.run(t, "snapshot", "create", "--name", "ready", "web")
	old.run(t, "stop", "halted")
}

func (u *upgrade) newSees(t *testing.T) {
	want := map[string]string{"web": "running", "quits": "running", "halted": "stopped", "fresh": "created"}
	if got := u.new.states(t); !maps.Equal(got, want) {
		t.Errorf("VMs are %v, want %v", got, want)
	}
	if got := u.new.run(t, "ls", "--quiet", "--label", "team=red"); lines(got) != 3 {
		t.Errorf("with the label there are %q", got)
	}
	if got := u.new.run(t, "inspect", "web"); !strings.Contains(got, `"COLOR": "blue"`) {
		t.Errorf("web is %s", got)
	}
	if got := u.new.run(t, "snapshot", "ls"); !strings.Contains(got, "ready") {
		t.Errorf("snapshots are %q", got)
	}
	if got := u.new.run(t, "events", "web"); !strings.Contains(got, "snapshot") {
		t.Errorf("events are %q", got)
	}
}

// use does with a running VM all that a command line can do with one.
func (u *upgrade) use(t *testing.T, p program, id string) {
	t.Helper()
	if got := p.run(t, "exec", id, "--", "sh", "-c", "cat /root/file; hostname; echo $COLOR"); got != id+"\n"+id+"\nblue" {
		t.Errorf("in %s there is %q", id, got)
	}
	there, back := filepath.Join(u.work, "there"), filepath.Join(u.work, "back")
	if err := os.MkdirAll(filepath.Join(there, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(there, "sub", "f"), []byte(p.name+id), 0o600); err != nil {
		t.Fatal(err)
	}
	p.run(t, "cp", there+"/.", id+":/root/tree")
	p.run(t, "cp", id+":/root/tree/.", back)
	if text, err := os.ReadFile(filepath.Join(back, "sub", "f")); err != nil || string(text) != p.name+id {
		t.Errorf("of the copy came back %q, %v", text, err)
	}
	p.run(t, "port", "add", id, "8098")
	if got := p.run(t, "port", "ls", id); !strings.Contains(got, "8098") {
		t.Errorf("ports are %q", got)
	}
	p.run(t, "pause", id)
	if got := p.states(t)[id]; got != "paused" {
		t.Errorf("%s is %s after a pause", id, got)
	}
	p.run(t, "resume", id)
	p.run(t, "exec", id, "--", "true")
	p.run(t, "logs", id)
}

func (u *upgrade) newUses(t *testing.T) {
	u.use(t, u.new, "web")
	if got := u.new.run(t, "port", "ls", "web"); !strings.Contains(got, "8099") {
		t.Errorf("ports are %q: one that the old build had added is gone", got)
	}
	// The old shim saves for the new manager.
	u.new.run(t, "snapshot", "create", "--name", "later", "web")
	if got := u.new.run(t, "fork", "--id", "child", "web"); !strings.Contains(got, "child") {
		t.Errorf("fork printed %q", got)
	}
	if got := u.new.run(t, "exec", "child", "--", "cat", "/root/file"); got != "web" {
		t.Errorf("the child has %q", got)
	}
	u.new.run(t, "rm", "child")
}

// newNotices has a guest power off under the old shim, which may not be able to write
// that down any more: see COMPATIBILITY.md.
func (u *upgrade) newNotices(t *testing.T) {
	_, _, _ = u.new.try(t, "exec", "quits", "--", "poweroff", "-f") // which takes the connection with it
	u.new.run(t, "logs", "--follow", "quits")                       // until it has ended
	got := u.new.states(t)["quits"]
	t.Logf("it is %s", got)
	if got != "stopped" && (u.sameDB || got != "error") {
		t.Errorf("a VM whose guest has powered off is %s", got)
	}
}

func (u *upgrade) newStarts(t *testing.T) {
	for _, id := range []string{"halted", "quits"} {
		u.new.run(t, "start", id)
		if got := u.new.run(t, "exec", id, "--", "cat", "/root/file"); got != id {
			t.Errorf("%s has %q", id, got)
		}
	}
	// It may be one of the old pool's VMs.
	u.new.run(t, "start", "fresh")
	if got := u.new.run(t, "exec", "fresh", "--", "hostname"); got != "fresh" {
		t.Errorf("fresh is %q", got)
	}
	u.new.run(t, "stop", "web")
	if got := u.new.states(t)["web"]; got != "stopped" {
		t.Errorf("web is %s after a stop", got)
	}
	u.new.run(t, "start", "web")
	u.use(t, u.new, "web")
	u.new.run(t, "rm", "fresh", "quits")
}

func (u *upgrade) newRestores(t *testing.T) {
	for _, name := range []string{"ready", "later"} {
		id := "from-" + name
		u.new.run(t, "snapshot", "restore", "--id", id, name)
		if got := u.new.run(t, "exec", id, "--", "sh", "-c", "cat /root/file; hostname"); got != "web\n"+id {
			t.Errorf("%s is %q", id, got)
		}
		u.new.run(t, "rm", id)
	}
	u.new.run(t, "snapshot", "rm", "ready")
}

// newMakes leaves what the old build is to manage.
func (u *upgrade) newMakes(t *testing.T) {
	u.new.run(t, "image", "build", "--quiet")
	u.new.run(t, "create", "--memory", "256M", "-e", "COLOR=blue", "--name", "made")
	u.new.run(t, "start", "--cold", "made")
	u.new.run(t, "exec", "made", "--", "sh", "-c", "echo made >/root/file; sync")
	u.new.run(t, "snapshot", "create", "--name", "new", "made")
}

func (u *upgrade) oldManages(t *testing.T) {
	want := map[string]string{"web": "running", "halted": "running", "made": "running"}
	if got := u.old.states(t); !maps.Equal(got, want) {
		t.Errorf("VMs are %v, want %v", got, want)
	}
	u.use(t, u.old, "made")
	u.old.run(t, "snapshot", "restore", "--id", "from-new", "new")
	if got := u.old.run(t, "exec", "from-new", "--", "sh", "-c", "cat /root/file; hostname"); got != "made\nfrom-new" {
		t.Errorf("from-new is %q", got)
	}
	u.old.run(t, "rm", "from-new")
	u.old.run(t, "stop", "made")
	u.old.run(t, "start", "made")
	u.use(t, u.old, "made")
	u.old.run(t, "rm", "halted", "made")
	u.old.run(t, "snapshot", "rm", "new")
}

func (u *upgrade) oldRefuses(t *testing.T) {
	before := u.new.states(t)
	for _, args := range [][]string{
		{"ls"}, {"inspect", "made"}, {"exec", "made", "--", "true"}, {"stop", "made"}, {"rm", "--force", "made"},
		{"create", "--name", "other"}, {"snapshot", "rm", "new"}, {"reconcile"},
	} {
		out, errs, err := u.old.try(t, args...)
		message, _, _ := strings.Cut(errs, "\nhint: ")
		if err == nil || out != "" || lines(message) != 1 || !strings.Contains(message, "upgrade smolvm") {
			t.Errorf("the old build's %q printed %q, and of its error (%v):\n%s", args, out, err, errs)
		}
	}
	if got := u.new.states(t); !maps.Equal(got, before) {
		t.Errorf("VMs are %v, and were %v", got, before)
	}
	u.use(t, u.new, "made")
	u.new.run(t, "snapshot", "restore", "--id", "from-new", "new")
	u.new.run(t, "rm", "from-new")
}
