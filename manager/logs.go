package manager

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
)

// Logs reads the guest's serial console, which holds what its kernel and agent
// printed in all of the VM's runs, or the end of it: some 4 to 8 MB are kept. What is
// read is as the guest wrote it, and may hold control sequences for terminals. The caller
// closes the reader; ctx governs the reading.
func (m *Manager) Logs(ctx context.Context, id string, opts smolvm.LogOptions) (io.ReadCloser, error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return nil, err
	}
	log, err := ring.NewReader(vm.LogPath)
	if errors.Is(err, fs.ErrNotExist) {
		// A VM that was never started has said nothing yet.
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	if err == nil && opts.Tail > 0 {
		err = log.SeekTail(opts.Tail)
	}
	if err == nil && opts.Follow && vm.State.Alive() {
		err = log.Follow(ctx, func(ctx context.Context) error {
			return proc.Wait(ctx, vm.ShimPID, vm.ShimStart)
		})
	}
	if err != nil {
		if log != nil {
			_ = log.Close()
		}
		return nil, vmError("read log of", id, err)
	}
	return log, nil
}
