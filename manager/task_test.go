package manager_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

// What goes wrong in the process of a background task is the same error here.
func TestTaskErrors(t *testing.T) {
	t.Parallel()
	config := useFake(t)
	config.Templates = manager.TemplateConfig{}
	config.DiskReserve = 1 << 60 // more than any disk has; it is the task that looks
	m := openAt(t, config)
	_, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{})
	if !errors.Is(err, smolvm.ErrDiskBudget) || smolvm.CodeOf(err) != smolvm.CodeNoRoom || !strings.Contains(err.Error(), "build template") {
		t.Errorf("a template without room: %v", err)
	}
	pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 1})
	if !errors.Is(err, smolvm.ErrDiskBudget) {
		t.Errorf("a pool without room: %+v, %v", pool, err)
	}
	pools, err := m.Pools(t.Context()) // it is to be filled when there is room
	if err != nil || len(pools) != 1 {
		t.Fatalf("pools are %+v, %v", pools, err)
	}
	if err := m.RemovePool(t.Context(), pools[0].ID); err != nil {
		t.Error(err)
	}
}

// A program that is no worker makes no pool and no template.
func TestTaskByOtherProgram(t *testing.T) {
	config := useFake(t)
	config.Templates = manager.TemplateConfig{}
	config.ShimCommand = []string{"true"}
	m := openAt(t, config)
	if pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 1}); err == nil || !strings.Contains(smolvm.HintOf(err), "shim.Main") {
		t.Errorf("SetPool: %+v, %v", pool, err)
	}
	pools, err := m.Pools(t.Context())
	if err != nil || len(pools) != 1 {
		t.Fatalf("pools are %+v, %v", pools, err)
	}
	if err := m.RemovePool(t.Context(), pools[0].ID); err != nil {
		t.Error(err)
	}
}

// A background task does not make a data directory anew that was removed meanwhile.
func TestTaskOfRemovedDataDir(t *testing.T) {
	config := useFake(t)
	if err := os.RemoveAll(config.DataDir); err != nil {
		t.Fatal(err)
	}
	orders, err := json.Marshal(map[string]any{"task": map[string]any{
		"data_dir": config.DataDir, "socket_dir": config.SocketDir, "backend": config.Backend, "shim": config.ShimCommand, "pool": "some-pool",
	}})
	if err != nil {
		t.Fatal(err)
	}
	reports, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reports.Close() }()
	cmd := exec.CommandContext(t.Context(), config.ShimCommand[0], append(config.ShimCommand[1:], "task")...)
	cmd.Stdin, cmd.ExtraFiles = bytes.NewReader(append(orders, '\n')), []*os.File{theirs}
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), config.DataDir) {
		t.Errorf("the task ends with %v, and says %q", err, out)
	}
	if _, err := os.Stat(config.DataDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the data directory is there: %v", err)
	}
	_ = theirs.Close()
	if text, err := io.ReadAll(reports); err != nil || !bytes.Contains(text, []byte(config.DataDir)) {
		t.Errorf("the task reports %q, %v", text, err)
	}
}
