package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
	"github.com/smolvm/smolvm/shim"
)

func TestMain(m *testing.M) {
	shim.Main()
	os.Exit(m.Run())
}

// The example does its job, on a real VM, and leaves nothing.
func TestJob(t *testing.T) {
	testenv.RequireQEMU(t)
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	testenv.SeedImages(t, data)
	testenv.NoProcesses(t, data)
	source := filepath.Join(dir, "source")
	for name, text := range map[string]string{"a.go": "1\n2\n3\n", "deep/b.go": "4\n", "notes.md": "one\ntwo\n"} {
		path := filepath.Join(source, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	config := manager.Config{
		DataDir:   data,
		Embedded:  true,
		AgentPath: testenv.Agent(t),
		Templates: manager.TemplateConfig{Disabled: true}, // one VM needs none
	}
	result := filepath.Join(dir, "result")
	if err := run(t.Context(), config, source, result); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(result)
	if err != nil || string(got) != "4 go\n2 md\n" {
		t.Errorf("the result is %q, %v", got, err)
	}
	if left, err := os.ReadDir(filepath.Join(data, "disks")); err != nil || len(left) > 0 {
		t.Errorf("disks are left: %v, %v", left, err)
	}
}
