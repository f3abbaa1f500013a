package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/shim"
)

func TestMain(m *testing.M) {
	shim.Main()
	os.Exit(m.Run())
}

// The backends can be compared where KVM works; the table is the test's output.
func TestBackends(t *testing.T) {
	testenv.RequireKVM(t)
	t.Setenv("SMOLVM_AGENT", testenv.Agent(t))
	data := filepath.Join(t.TempDir(), "data")
	testenv.SeedImages(t, data)
	if err := backends(context.Background(), []string{"-runs", "2", "-images", data}); err != nil {
		t.Fatal(err)
	}
}
