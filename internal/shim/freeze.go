package shim

import (
	"context"
	"fmt"
)

// FreezeOrder says what is done with a VM that is frozen.
type FreezeOrder struct {
	// Commands are run in the guest before that, as root.
	Commands [][]string `json:"commands,omitempty"`
	// Memory and State are the files to make.
	Memory string `json:"memory"`
	State  string `json:"state"`
}

// Freeze has a shim boot a VM, take it through a login and commands, save it when nobody
// talks to it any more, and end it. The spec has no forwards, no time to live and no runtime
// directory: nobody can reach the VM. Freeze returns when nothing of it runs any more. If it
// fails, or ctx is done first, what has been made of the files is the caller's to remove.
func Freeze(ctx context.Context, opts LaunchOptions) error {
	logStart := sizeOf(opts.LogPath)
	l, err := spawn(opts)
	if err != nil {
		return fmt.Errorf("start shim: %w", err)
	}
	err = l.order(ctx, opts, logStart)
	l.Abort(context.WithoutCancel(ctx))
	return err
}
