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
	Imports    []string
	Deps       []string
	Standard   bool
}

func list(t *testing.T, args ...string) map[string]pkg {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,Deps,Standard"}, args...)...).Output()
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
	}
}

// room is the peer that a package belongs to; empty if it belongs to none.
func room(path string) string {
	inner, ok := strings.CutPrefix(path, module+"/internal/")
	if !ok {
		return ""
	}
	first, _, _ := strings.Cut(inner, "/")
	if slices.Contains([]string{"store", "network", "image", "disk", "agent", "vmm", "host", "snapshot"}, first) {
		return first
	}
	return ""
}

func TestImports(t *testing.T) {
	for path, p := range list(t, module+"/...") {
		short := strings.TrimPrefix(path, module+"/")
		for _, imported := range p.Imports {
			target := strings.TrimPrefix(imported, module+"/")
			ours := strings.HasPrefix(imported, module)
			switch {
			case path == module && strings.Contains(imported, "."):
				t.Errorf("the root package imports %s: it is the domain, with the standard library only", imported)
			case ours && room(path) != "" && room(imported) != "" && room(path) != room(imported) && !allowed(short, target):
				t.Errorf("%s imports %s: peers don't know each other, the manager moves data between them", short, target)
			case target == "internal/vmm/qemu" && short != "cmd/smolvm":
				t.Errorf("%s imports the QEMU backend: backends are wired in where the program starts", short)
			case target == "internal/vmm/vmmfake":
				t.Errorf("%s imports the fake VMM, which is for tests only", short)
			case target == "internal/testenv" && short != "internal/testenv":
				t.Errorf("%s imports internal/testenv, which is for tests only", short)
			case target == "internal/cli" && short != "cmd/smolvm":
				t.Errorf("%s imports the commands: imports point downwards", short)
			case target == "manager" && strings.HasPrefix(short, "internal/") && short != "internal/cli":
				t.Errorf("%s imports the manager: imports point downwards", short)
			}
		}
	}
}

// allowed are the peers that may know each other, each with its reason.
func allowed(from, to string) bool {
	switch {
	case strings.HasPrefix(from, "internal/image") && to == "internal/disk":
		return true // an image's root file system is a disk file
	case strings.HasPrefix(from, "internal/snapshot") && to == "internal/disk":
		return true // a snapshot is made of sparse files, and so are disks
	case strings.HasPrefix(from, "internal/image") && to == "internal/agent/wire":
		return true // the list of modules in an initramfs is read by the agent
	case from == "internal/vmm/vmmfake" && strings.HasPrefix(to, "internal/agent/"):
		return true // a guest for tests speaks the agent's protocol
	}
	return false
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
