package manager

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"

	shimprocess "github.com/smolvm/smolvm/internal/shim/process"
	"github.com/smolvm/smolvm/internal/teardown"
	"github.com/smolvm/smolvm/internal/vmm"
)

// newRun makes a name for one run of a VM, by which the end of that run is told
// from the end of any other.
func newRun() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}

// ShimOptions are the options of [RunShim].
type ShimOptions struct {
	// Stdin carries the shim's orders from [Manager.Start].
	Stdin io.Reader
	// Backends are what the shim can run VMs by. This is where they are wired in.
	Backends []vmm.Backend
}

// RunShim makes this process the shim of one VM, as ordered by [Manager.Start], and
// returns when the VM has ended and its end is written down; or it makes a template, or
// fills a pool. It is for programs that serve as [Config].ShimCommand.
func RunShim(ctx context.Context, opts ShimOptions) error {
	task, stdin, err := readTask(opts.Stdin)
	if err != nil {
		return fmt.Errorf("read orders: %w", err)
	}
	if task != nil {
		return task.run(ctx, opts.Backends)
	}
	return shimprocess.Main(ctx, shimprocess.Options{
		Stdin:    stdin,
		Backends: opts.Backends,
		Exited:   teardown.RecordExit,
		Halted:   teardown.RecordHalt,
	})
}

// site is what the deletion of a VM needs, in shims too.
func (m *Manager) site() *teardown.Site {
	return &teardown.Site{Dir: m.dir, Store: m.store, Disks: m.disks, Actor: m.actor}
}
