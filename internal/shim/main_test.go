package shim_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/shim/process"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/qemu"
)

// What this test's program can be, beside the test: the first argument says it.
const (
	shimRole     = "shim"     // a shim, as the CLI's is
	vmmRole      = "vmm"      // what fakeBackend starts
	launcherRole = "launcher" // a process that launches a shim, to be killed
)

func TestMain(m *testing.M) {
	role := ""
	if len(os.Args) > 1 {
		role = os.Args[1]
	}
	var err error
	switch role {
	case shimRole:
		err = shimMain()
	case vmmRole:
		err = vmmMain(os.Args[2:])
	case launcherRole:
		err = launcherMain()
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// recordName is the file for the exit record, in the place of a data directory.
const recordName = "record"

func shimMain() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return process.Main(ctx, process.Options{
		Stdin:    os.Stdin,
		Backends: []vmm.Backend{fakeBackend{}, qemu.New(qemu.Options{})},
		Exited: func(_ context.Context, record shim.ExitRecord) error {
			text, err := json.Marshal(record)
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(record.Origin.DataDir, recordName), text, 0o600)
		},
	})
}

// launcherMain does as its standard input says, reports each step on its standard
// output, and lives until it is killed.
func launcherMain() error {
	input := bufio.NewReader(os.Stdin)
	var orders struct {
		Options shim.LaunchOptions
		Commit  bool
	}
	line, err := input.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &orders)
	}
	if err != nil {
		return err
	}
	fmt.Println("launching")
	launched, err := shim.Launch(context.Background(), orders.Options)
	if err != nil {
		return err
	}
	if orders.Commit {
		if err := launched.Commit(); err != nil {
			return err
		}
	}
	fmt.Println("launched")
	_, err = input.ReadByte()
	return err
}
