package manager_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm/vmmfake"
	"github.com/smolvm/smolvm/manager"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		beShim(os.Args[1])
	}
	if len(os.Args) > 1 && os.Args[1] == childCommand {
		os.Exit(childMain(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == vmmfake.Command {
		os.Exit(vmmfake.Main(os.Args[2:]))
	}
	os.Exit(testenv.Main(m.Run))
}

// tempDir is a short directory, as sockets are made below it.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "smolvm-test-") //nolint:usetesting // t.TempDir has long names
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove test directory: %v", err)
		}
	})
	return dir
}

func testConfig(t testing.TB, dir string) manager.Config {
	t.Helper()
	config, err := as(manager.Config{
		DataDir:   filepath.Join(dir, "data [a], 100%b"), // patterns and options give these a meaning
		SocketDir: filepath.Join(dir, "run"),
		Backend:   "qemu",
		AgentPath: "/nonexistent/agent", // nothing may need it that does not boot an image
		// Only tests of templates want a second VM booted for each that they start.
		Templates: manager.TemplateConfig{Disabled: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// openEmpty opens a Manager without an image: for what needs no VM.
func openEmpty(t testing.TB) *manager.Manager {
	t.Helper()
	m, err := manager.Open(t.Context(), testConfig(t, tempDir(t)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return m
}

// openReal opens a Manager that can boot the default image, and checks at the test's
// end that nothing is left of its VMs.
func openReal(t testing.TB) *manager.Manager {
	t.Helper()
	return openAt(t, useReal(t))
}

// useReal returns the configuration of a Manager that can boot the default image.
func useReal(t testing.TB) manager.Config {
	t.Helper()
	return useRealKind(t, realKind)
}

// useRealKind is useReal with VMs of a kind.
func useRealKind(t testing.TB, k kind) manager.Config {
	t.Helper()
	testenv.RequireQEMU(t)
	dir := tempDir(t)
	setKind(t, dir, k)
	config := testConfig(t, dir)
	config.AgentPath = testenv.Agent(t)
	testenv.SeedImages(t, config.DataDir)
	return config
}

// openAt opens a Manager, and checks at the test's end that nothing is left of its VMs.
func openAt(t testing.TB, config manager.Config) *manager.Manager {
	t.Helper()
	m, err := manager.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		awaitTemplates(t, m)
		vms, err := m.List(ctx, smolvm.ListOptions{})
		if err != nil {
			t.Errorf("list: %v", err)
		}
		for _, vm := range vms {
			if err := m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}); err != nil {
				t.Errorf("delete %s: %v", vm.ID, err)
			}
		}
		awaitProcesses(config)
		if _, err := m.PruneTemplates(ctx, smolvm.PruneTemplateOptions{All: true}); err != nil {
			t.Errorf("prune templates: %v", err)
		}
		checkNothingLeft(t, config)
		if err := m.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return m
}

// awaitProcesses waits until no process writes to a log of the data directory any more, nor
// has it in its command line. What works in the background, and has nothing to do any more,
// ends by itself; what does not end in time is found by checkNothingLeft.
func awaitProcesses(config manager.Config) {
	for until := time.Now().Add(20 * time.Second); len(processesIn(config.DataDir)) > 0 && time.Now().Before(until); {
		time.Sleep(10 * time.Millisecond)
	}
}

// processesIn lists the processes that have a data directory in their command line, or their
// log in it.
func processesIn(dataDir string) []string {
	found := testenv.Processes(dataDir)
	logs, _ := filepath.Glob("/proc/[0-9]*/fd/2")
	for _, path := range logs {
		if log, err := os.Readlink(path); err == nil && strings.HasPrefix(log, dataDir+"/") {
			found = append(found, path+" -> "+log)
		}
	}
	return found
}

// checkNothingLeft fails the test if processes or files of VMs are there.
func checkNothingLeft(t testing.TB, config manager.Config) {
	t.Helper()
	for _, process := range processesIn(config.DataDir) {
		t.Errorf("left behind: process %s", process)
	}
	for _, dir := range []string{"disks", "layers", "vms", "locks", "pool", "snapshots", "templates"} {
		checkEmpty(t, filepath.Join(config.DataDir, dir))
	}
	checkEmpty(t, config.SocketDir)
}

func checkEmpty(t testing.TB, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), ".lock") {
			continue // of a directory, for as long as that is there
		}
		t.Errorf("left behind: %s", filepath.Join(dir, entry.Name()))
	}
}

func mustCreate(t testing.TB, m *manager.Manager, config smolvm.VMConfig) smolvm.VMInfo {
	t.Helper()
	vm, err := m.Create(t.Context(), config, smolvm.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

// mustRun creates and starts a VM.
func mustRun(t testing.TB, m *manager.Manager, config smolvm.VMConfig) smolvm.VMInfo {
	t.Helper()
	vm, err := m.Start(t.Context(), mustCreate(t, m, config).ID, smolvm.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

// sh runs a shell's line in a VM and returns what it printed.
func sh(t testing.TB, m *manager.Manager, id, line string) string {
	t.Helper()
	var out bytes.Buffer
	status, err := m.Exec(t.Context(), id, smolvm.Command{Args: []string{"sh", "-c", line}, Stdout: &out, Stderr: &out})
	if err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	if !status.Success() {
		t.Fatalf("%s: %s\n%s", line, status, out.String())
	}
	return strings.TrimSpace(out.String())
}
