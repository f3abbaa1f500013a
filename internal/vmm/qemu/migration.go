package qemu

import (
	"context"
	"fmt"
	"os"

	"github.com/smolvm/smolvm/internal/vmm"
)

// stateFile is the name by which QEMU knows the stream that it saves a guest to.
const stateFile = "state"

// States of a migration, as its events tell them; see QEMU's qapi/migration.json.
const (
	stateCompleted = "completed"
	stateFailed    = "failed"
	stateCancelled = "cancelled"
	// maxStates is more than one migration goes through.
	maxStates = 32
)

// openRestore opens the state that a guest is to be restored from. A memory of another
// size is refused here: QEMU would make it, or map what there is.
func openRestore(cfg vmm.Config) (*os.File, error) {
	memory, err := os.Stat(cfg.Restore.Memory)
	if err != nil {
		return nil, err
	}
	if want := int64(cfg.MemoryMiB) << 20; memory.Size() != want {
		return nil, fmt.Errorf("the saved memory %s is of %d bytes, not of the VM's %d", cfg.Restore.Memory, memory.Size(), want)
	}
	return os.Open(cfg.Restore.State)
}

// awaitLoaded returns when the guest that is being restored runs. What QEMU tells unasked
// is waited for, as it reads a command byte by byte, and has better things to do now. Of
// a guest that stays held it tells nothing.
func (i *instance) awaitLoaded(ctx context.Context, now *status) error {
	if !i.cfg.Restore.Held {
		select {
		case <-i.resumed:
			now.Running = true
			return nil
		case <-i.qmp.done:
			return errQMPClosed
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	// QEMU loads a guest in one go and answers before or after, so this takes a turn or
	// two.
	for now.Status == statusLoading {
		if err := i.qmp.execute(ctx, "query-status", now); err != nil {
			return err
		}
	}
	if now.Running {
		return nil
	}
	err := i.qmp.execute(ctx, "cont", nil)
	now.Running = err == nil
	return err
}

// capabilities are switched on or off for a migration.
type capabilities []struct {
	Capability string `json:"capability"`
	State      bool   `json:"state"`
}

// prepareMigration hands QEMU the file that the migration goes to or comes from.
func (i *instance) prepareMigration(ctx context.Context, c capabilities, file *os.File) error {
	err := i.qmp.settle(ctx, request{Execute: "migrate-set-capabilities", Arguments: map[string]any{"capabilities": c}})
	if err != nil {
		return err
	}
	return i.qmp.settle(ctx, request{Execute: "getfd", Arguments: map[string]any{"fdname": stateFile}, file: file})
}

func uriOf(name string) map[string]any { return map[string]any{"uri": "fd:" + name} }

// nextState waits for the next state of the migration under way.
func (i *instance) nextState(ctx context.Context) (string, error) {
	select {
	case state := <-i.migration:
		return state, nil
	case <-i.qmp.done:
		return "", errQMPClosed
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}
