// Package deptest guards the shape of the house: which package may know which.
package deptest

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/smolvm/smolvm"

// pkg is what `go list` tells of a package.
type pkg struct {
	ImportPath string
	Dir        string
	Imports    []string
	Deps       []string
	Standard   bool
}

func list(t *testing.T, args ...string) map[string]pkg {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list", "-json=ImportPath,Dir,Imports,Deps,Standard"}, args...)...).Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	packages := map[string]pkg{}
	decoder := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages[p.ImportPath] = p
		if !p.Standard {
			// The go command sees by this on what the test's result depends, and does
			// not take an earlier one from its cache.
			if _, err := os.ReadDir(p.Dir); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// tiers are the floors of the house, from the ground up: a package imports those below its
// own floor, and those of its own room (a room is a folder of internal). A package belongs to
// the longest name that it begins with.
func tiers() [][]string {
	return [][]string{
		{"."}, // the contract
		{ // ground: knows nothing of VMs
			"internal/cgroup", "internal/compat", "internal/diskspace", "internal/errcode", "internal/flock", "internal/glob", "internal/proc",
			"internal/ring", "internal/size", "internal/step", "internal/stream", "internal/termsafe",
		},
		{"internal/datadir", "internal/disk"}, // files
		{ // nouns
			"internal/agent", "internal/backing", "internal/host", "internal/image", "internal/network",
			"internal/snapshot", "internal/store", "internal/vmm",
		},
		{"internal/shim"},         // one running VM
		{"internal/teardown"},     // its end
		{"manager"},               // the engine
		{"internal/shim/program"}, // what programs are that serve as shims
		{"shim"},                  // the same, with backends
		{"internal/cli"},
		{"cmd", "bench", "examples", "test"},
	}
}

// place returns a package's tier, and the name by which it has it. Packages for tests only
// have none: what they need they may know.
func place(path string) (tier int, name string, ok bool) {
	for i, names := range tiers() {
		for _, n := range names {
			if (path == n || strings.HasPrefix(path, n+"/")) && len(n) > len(name) {
				tier, name, ok = i, n, true
			}
		}
	}
	return tier, name, ok
}

// forTests reports whether a package is for tests only.
func forTests(path string) bool {
	return path == "internal/deptest" || path == "internal/testenv" || strings.HasPrefix(path, "internal/testenv/") ||
		strings.HasPrefix(path, "internal/") && (strings.HasSuffix(path, "test") || strings.HasSuffix(path, "fake"))
}

// onlyBy are packages that one other only may import.
func onlyBy() map[string]string {
	return map[string]string{
		// Backends are wired in where a program becomes a shim, and nothing else has a
		// VMM or a TCP/IP stack in it.
		"internal/vmm/qemu":        "shim",
		"internal/shim/process":    "internal/shim/program",
		"internal/network/usernet": "internal/shim/process",
		"internal/cli":             "cmd/smolvm",
	}
}

// wrong returns why one package of this module may not import another; empty if it may.
func wrong(from, to string) string {
	if forTests(from) {
		return ""
	}
	if forTests(to) {
		return "it is for tests only"
	}
	if only, ok := onlyBy()[to]; ok && from != only {
		return "only " + only + " may"
	}
	fromTier, fromName, fromOK := place(from)
	toTier, toName, toOK := place(to)
	switch {
	case !fromOK:
		return from + " is in no tier: give it one"
	case !toOK:
		return to + " is in no tier: give it one"
	case fromName == toName, toTier < fromTier, allowed(from, to):
		return ""
	case toTier == fromTier:
		return "peers don't know each other; who is above them moves data between them"
	}
	return "imports point downwards"
}

// allowed are the peers that may know each other, each with its reason.
func allowed(from, to string) bool {
	// The list of modules in an initramfs is read by the agent.
	return from == "internal/image" && to == "internal/agent/wire"
}

// short returns a package's path in this module; ok is false for one of another.
func short(path string) (_ string, ok bool) {
	if path == module {
		return ".", true
	}
	return strings.CutPrefix(path, module+"/")
}

func TestImports(t *testing.T) {
	packages := list(t, module+"/...")
	for path, p := range packages {
		from, _ := short(path)
		for _, imported := range p.Imports {
			if from == "." && strings.Contains(imported, ".") {
				t.Errorf("the root package imports %s: it is the contract, with the standard library only", imported)
			}
			if to, ours := short(imported); ours {
				if why := wrong(from, to); why != "" {
					t.Errorf("%s imports %s: %s", from, to, why)
				}
			}
		}
	}
	// A rule about a package that is gone guards nothing.
	for only, by := range onlyBy() {
		if !slices.Contains(packages[module+"/"+by].Imports, module+"/"+only) {
			t.Errorf("%s does not import %s, as the rules have it", by, only)
		}
	}
}

func TestRules(t *testing.T) {
	tests := []struct {
		from, to string
		want     bool
	}{
		{"manager", "internal/shim", true},
		{"manager", "internal/shim/process", false},
		{"manager", "internal/network/usernet", false},
		{"manager", "internal/vmm/qemu", false},
		{"manager", "internal/vmm/traits", true},
		{"internal/vmm/traits", "internal/vmm/qemu", false},
		{"manager", "shim", false},
		{"internal/shim", "internal/shim/process", false},
		{"internal/shim/process", "internal/shim", true},
		{"internal/shim/process", "manager", false},
		{"internal/shim/program", "manager", true},
		{"internal/teardown", "manager", false},
		{"internal/store", "internal/network", false},
		{"internal/store", "internal/datadir", true},
		{"internal/ring", "internal/disk", false},
		{"internal/image", "internal/agent/wire", true},
		{"internal/image", "internal/agent", false},
		{"internal/agent/guest", "internal/agent/wire", true},
		{"internal/cli", "shim", true},
		{"cmd/smolvm", "internal/testenv", false},
		{"internal/novelty", ".", false},
		{".", "internal/ring", false},
	}
	for _, test := range tests {
		if why := wrong(test.from, test.to); (why == "") != test.want {
			t.Errorf("%s imports %s: %q; may it: %v", test.from, test.to, why, test.want)
		}
	}
}

// A program that uses VMs has nothing in it of what runs them: that is in the shim.
func TestManagerLinksNoVMM(t *testing.T) {
	packages := list(t, module+"/manager", module+"/shim")
	for _, forbidden := range []string{"gvisor.dev/", module + "/internal/network/usernet", module + "/internal/shim/process", module + "/internal/vmm/qemu"} {
		begins := func(dep string) bool { return strings.HasPrefix(dep, forbidden) }
		if slices.ContainsFunc(packages[module+"/manager"].Deps, begins) {
			t.Errorf("package manager links %s", forbidden)
		}
		if !slices.ContainsFunc(packages[module+"/shim"].Deps, begins) {
			t.Errorf("package shim does not link %s any more: name what it links in its place", forbidden)
		}
	}
}

// maxAgent is how large the agent may be, in bytes.
const maxAgent = 6_000_000

func TestAgentSize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, module+"/cmd/smolvm-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build agent: %v\n%s", err, out)
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() > maxAgent {
		t.Errorf("the agent has %d bytes (%v); at most %d are allowed", info.Size(), err, maxAgent)
	}
}

// The agent goes into every guest, and into memory that guests need.
func TestAgentStaysSmall(t *testing.T) {
	agent := list(t, module+"/cmd/smolvm-agent")[module+"/cmd/smolvm-agent"]
	for _, forbidden := range []string{"net/http", "database/sql", "modernc.org/", "github.com/spf13/cobra", "gvisor.dev/", "github.com/vishvananda/netlink"} {
		for _, dep := range agent.Deps {
			if strings.HasPrefix(dep, forbidden) {
				t.Errorf("the agent depends on %s: it would not stay below 6 MB", dep)
			}
		}
	}
}
