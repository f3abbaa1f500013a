package qemu

import (
	"context"
	"fmt"
	"os"

	"github.com/smolvm/smolvm/internal/vmm"
)

// stateFile is the name by which QEMU knows the file descriptor of a saved state.
const stateFile = "state"

// States of a migration, as its events tell them; see QEMU's qapi/migration.json.
const (
	stateCompleted = "completed"
	stateFailed    = "failed"
	stateCancelled = "cancelled"
	// maxStates is more than one migration goes through.
	maxStates = 32
)

// load makes the guest that was saved go on.
func (i *instance) load(ctx context.Context, from vmm.Restore) error {
	state, err := os.Open(from.State)
	if err != nil {
		return err
	}
	defer func() { _ = state.Close() }()
	err = i.prepareMigration(ctx, capabilities{{"events", true}}, state)
	if err == nil {
		err = i.qmp.do(ctx, request{Execute: "migrate-incoming", Arguments: uriOf(stateFile)}, nil)
	}
	for err == nil {
		var reached string
		if reached, err = i.nextState(ctx); reached == stateCompleted {
			break
		}
	}
	var now status
	if err == nil {
		err = i.qmp.execute(ctx, "query-status", &now)
	}
	if err == nil && !now.Running {
		err = i.qmp.execute(ctx, "cont", nil) // it was saved while it was held
	}
	if err != nil {
		return fmt.Errorf("restore the guest: %w", err)
	}
	return nil
}

// capabilities are switched on or off for a migration.
type capabilities []struct {
	Capability string `json:"capability"`
	State      bool   `json:"state"`
}

// prepareMigration hands QEMU the file that the migration goes to or comes from.
func (i *instance) prepareMigration(ctx context.Context, c capabilities, file *os.File) error {
	err := i.qmp.do(ctx, request{Execute: "migrate-set-capabilities", Arguments: map[string]any{"capabilities": c}}, nil)
	if err != nil {
		return err
	}
	return i.qmp.do(ctx, request{Execute: "getfd", Arguments: map[string]any{"fdname": stateFile}, file: file}, nil)
}

func uriOf(name string) map[string]any { return map[string]any{"uri": "fd:" + name} }

// nextState waits for the next state of the migration under way. An incoming migration
// that fails ends QEMU.
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
