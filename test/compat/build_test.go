package compat_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/testenv"
)

// previousEnv names another commit than that of the file PREVIOUS, to try a step that
// users may take too.
const previousEnv = "SMOLVM_COMPAT_PREVIOUS"

// patience is how long one command may take, on a host that is busy and has no KVM.
const patience = 3 * time.Minute

// program is one build of smolvm, with the agent beside it.
type program struct {
	name string // "old" or "new", for messages
	path string
	env  []string
}

// previousCommit returns the commit whose build is the old one. The test is skipped where
// the checkout has no history, but not in CI, where it would be skipped for ever.
func previousCommit(t *testing.T, root string) string {
	t.Helper()
	commit := os.Getenv(previousEnv)
	if commit == "" {
		text, err := os.ReadFile("PREVIOUS")
		if err != nil {
			t.Fatal(err)
		}
		commit = strings.TrimSpace(string(text))
	}
	missing := t.Skipf
	if os.Getenv("CI") != "" {
		missing = t.Fatalf
	}
	if _, err := os.Stat(filepath.Join(root, ".git")); err != nil {
		t.Skip("this is no git checkout, so there is no previous build: ", err)
	}
	out, err := git(t, root, "rev-parse", "--verify", "--quiet", commit+"^{commit}")
	if err != nil {
		missing("commit %s is not in this checkout, which is shallow or of another history; `git fetch origin %s` gets it", commit, commit)
	}
	return out
}

func git(t *testing.T, root string, args ...string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "git", append([]string{"-C", root}, args...)...).Output()
	return strings.TrimSpace(string(out)), err
}

// buildPrevious builds the programs of a commit, and keeps them for later runs.
func buildPrevious(t *testing.T, root, commit string) string {
	t.Helper()
	dir := filepath.Join(testenv.Cache(t), "compat", commit)
	if _, err := os.Stat(dir); err == nil {
		return filepath.Join(dir, "smolvm")
	}
	work := t.TempDir()
	source, archive := filepath.Join(work, "source"), filepath.Join(work, "source.tar")
	if err := os.Mkdir(source, 0o700); err != nil {
		t.Fatal(err)
	}
	must(t, root, "git", "archive", "--format=tar", "-o", archive, commit)
	must(t, source, "tar", "-xf", archive)
	// Another run may do the same: the first one that has both programs wins.
	half, err := os.MkdirTemp(testenv.Cache(t), "compat-*") //nolint:usetesting // it is renamed within one file system
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(half) }()
	build(t, source, half, commit[:12])
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(half, dir); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	return filepath.Join(dir, "smolvm")
}

// build builds smolvm and its agent. The version is in both, so that agents of two
// versions are two, as those of releases are.
func build(t *testing.T, source, target, version string) {
	t.Helper()
	for _, name := range []string{"smolvm", "smolvm-agent"} {
		must(t, source, "go", "build", "-trimpath", "-ldflags", "-s -w -X main.version="+version,
			"-o", filepath.Join(target, name), "./cmd/"+name)
	}
}

// must runs a program in a directory.
func must(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// try runs a command of the program.
func (p program) try(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.path, args...)
	var out, errs bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = p.env, &out, &errs
	began := time.Now()
	err = cmd.Run()
	t.Logf("%5.2f s  %s %s", time.Since(began).Seconds(), p.name, strings.Join(args, " "))
	return strings.TrimSpace(out.String()), strings.TrimSpace(errs.String()), err
}

// run runs a command that must succeed, and returns what it prints.
func (p program) run(t *testing.T, args ...string) string {
	t.Helper()
	out, errs, err := p.try(t, args...)
	if err != nil {
		t.Fatalf("%s smolvm %q: %v\n%s\n%s", p.name, args, err, errs, out)
	}
	return out
}

// states returns the states of all VMs, by their ids.
func (p program) states(t *testing.T) map[string]string {
	t.Helper()
	var vms []struct{ ID, State string }
	out := p.run(t, "ls", "--json")
	if err := json.Unmarshal([]byte(out), &vms); err != nil {
		t.Fatalf("%s smolvm ls: %v\n%s", p.name, err, out)
	}
	states := map[string]string{}
	for _, vm := range vms {
		states[vm.ID] = vm.State
	}
	return states
}

// with returns the program with another data directory.
func (p program) with(dataDir string) program {
	p.env = append(slices.Clip(p.env), "SMOLVM_DATA_DIR="+dataDir)
	return p
}

// schema returns the version of the database that a program makes.
func (p program) schema(t *testing.T) uint32 {
	t.Helper()
	dir := t.TempDir()
	kernel := filepath.Join(dir, "none")
	// It makes the directory, whether or not it can make the VM.
	_, errs, _ := p.with(dir).try(t, "create", "--kernel", kernel)
	text, err := os.ReadFile(filepath.Join(dir, "smolvm.db"))
	if err != nil {
		t.Fatalf("%v: %s", err, errs)
	}
	// SQLite's user_version; see its file format, section 1.3.
	const at = 60
	if len(text) < at+4 {
		t.Fatalf("the database of the %s build has %d bytes", p.name, len(text))
	}
	return binary.BigEndian.Uint32(text[at:])
}

// checkEmpty fails the test if a data directory still holds anything of a VM.
func checkEmpty(t *testing.T, dataDir string) {
	t.Helper()
	for _, name := range []string{"vms", "disks", "locks", "snapshots", "layers", "pool", "templates"} {
		left, err := filepath.Glob(filepath.Join(dataDir, name, "[^.]*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range left {
			t.Errorf("left behind: %s", path)
		}
	}
}

func lines(text string) int { return len(strings.Split(strings.TrimSpace(text), "\n")) }

func (p program) String() string { return fmt.Sprintf("the %s build", p.name) }
