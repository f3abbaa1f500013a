package guest

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"sync"

	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/fuserelay"
	"github.com/smolvm/smolvm/internal/stream"
)

// hostMounts are the directories of the host that are mounted in the guest. The kernel's requests
// are passed on to the host as they are.
type hostMounts struct {
	modules *demandedModules

	mu     sync.Mutex // guards the following
	mounts []*hostMount
}

// hostMount is one of them.
type hostMount struct {
	number int
	fs     *fuserelay.FS
}

// drop ends all mounts: what was restored is not connected to what the guest had mounted when it
// was saved. Programs that have files of it open get errors from now on.
func (m *hostMounts) drop() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for i := len(m.mounts) - 1; i >= 0; i-- { // the later ones may be in earlier ones
		errs = append(errs, m.mounts[i].fs.Abort())
	}
	m.mounts = nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end mounts of the host before: %w", err)
	}
	return nil
}

// serve mounts a directory of the host, and passes on what the kernel asks for, to the end of the
// connection.
func (m *hostMounts) serve(order wire.Mount, conn stream.Peeked) {
	mount, err := m.mount(order)
	if err != nil {
		_ = wire.Write(conn, wire.ControlAnswer{Error: err.Error()})
		return
	}
	if wire.Write(conn, wire.ControlAnswer{}) == nil {
		_ = mount.fs.Relay(conn)
	}
}

// mount mounts a directory, or finds it if it is mounted.
func (m *hostMounts) mount(order wire.Mount) (*hostMount, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if order.Again {
		for _, mount := range m.mounts {
			if mount.number == order.Number {
				return mount, nil
			}
		}
		return nil, fmt.Errorf("%s is not mounted", order.Target)
	}
	if err := m.modules.load("fuse"); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(order.Target, 0o755); err != nil {
		return nil, err
	}
	fs, err := fuserelay.Mount(order.Target, fuserelay.Options{ReadOnly: order.ReadOnly, Source: order.Source})
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("the guest's kernel has no FUSE, by which directories of the host are mounted: %w", err)
	}
	if err != nil {
		return nil, err
	}
	if len(m.mounts) == 0 {
		runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), minProcs))
	}
	mount := &hostMount{number: order.Number, fs: fs}
	m.mounts = append(m.mounts, mount)
	return mount, nil
}

// ready returns when all mounts can be used.
func (m *hostMounts) ready() error {
	m.mu.Lock()
	mounts := append([]*hostMount(nil), m.mounts...)
	m.mu.Unlock()
	for _, mount := range mounts {
		if err := mount.fs.Probe(); err != nil {
			return err
		}
	}
	return nil
}

// minProcs is how many goroutines run at once at least while there are mounts. A fork holds one of
// these places until its program is executed, and that program, or its directory, may be in a mount
// that this process serves.
const minProcs = 2

// beforeFork prevents that a fork waits for this process, which waits for the fork: that no
// garbage is collected meanwhile, for which all of Go's threads would have to stop. What it
// returns is to be called after the fork.
func (m *hostMounts) beforeFork() (after func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.mounts) == 0 {
		return func() {}
	}
	limit := debug.SetMemoryLimit(math.MaxInt64) // waits for a collection under way
	percent := debug.SetGCPercent(-1)
	return func() {
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	}
}
