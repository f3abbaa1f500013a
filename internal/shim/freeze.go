package shim

import (
	"context"
	"fmt"
	"time"
)

// slowestDisk is how many MiB of a guest's memory are written each second, at the least, to a
// disk that others use too.
const slowestDisk = 2

// saveTime returns how long the saving of a guest with so much memory may take.
func saveTime(memoryMiB int) time.Duration {
	return time.Duration(memoryMiB) * time.Second / slowestDisk
}

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
// A shim that does not report in time is an error, as in [Launch].
func Freeze(ctx context.Context, opts LaunchOptions) error {
	logStart := sizeOf(opts.LogPath)
	l, err := spawn(opts)
	if err != nil {
		return fmt.Errorf("start shim: %w", err)
	}
	err = l.order(ctx, opts, sum(opts.answerTime(), saveTime(opts.Spec.VMM.MemoryMiB)), logStart)
	l.Abort(context.WithoutCancel(ctx))
	return err
}
