package session

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/hostdir"
)

// stepMounts is the step of a start in which directories of the host are mounted.
const stepMounts = "mounts"

// mounts are the directories of the host that the guest has.
type mounts struct {
	// mu guards the following. It is held while they are closed, which more than one may do: who
	// stops the VM, and its shim at its end.
	mu      sync.Mutex
	dirs    []*hostdir.Dir
	serving sync.WaitGroup
	cancel  context.CancelFunc
}

// close ends the serving of all, and closes them. The guest has ended.
func (m *mounts) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cancel != nil {
		m.cancel()
	}
	m.serving.Wait()
	for _, dir := range m.dirs {
		_ = dir.Close()
	}
	m.dirs, m.cancel = nil, nil
}

// begin makes the next close end all that is served from now on.
func (m *mounts) begin(cancel context.CancelFunc) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cancel = cancel
}

// add has a directory closed by the next close.
func (m *mounts) add(dir *hostdir.Dir) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dirs = append(m.dirs, dir)
}

// serve runs what serves a directory, for which the next close waits.
func (m *mounts) serve(run func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.serving.Go(run)
}

// mount gives the guest its directories of the host.
func (s *Session) mount(ctx context.Context) error {
	if len(s.spec.Mounts) == 0 {
		return nil
	}
	s.mounts.close() // of a boot before
	link, err := s.agentLink(ctx)
	if err != nil {
		return err
	}
	serving, cancel := context.WithCancel(context.Background())
	s.mounts.begin(cancel)
	for _, n := range mountOrder(s.spec.Mounts) {
		if err := s.mountOne(ctx, serving, link, n); err != nil {
			return err
		}
		if s.spec.Mounts[n].Mode != smolvm.MountOverlay {
			continue
		}
		// Others may be in the overlay, which is mounted then.
		if err := link.MountsReady(ctx); err != nil {
			return err
		}
	}
	if err := link.MountsReady(ctx); err != nil {
		return err
	}
	s.step(stepMounts)
	return nil
}

// mountOrder returns the numbers of mounts in the order in which they are made: one that is in
// another comes after it.
func mountOrder(all []smolvm.Mount) []int {
	order := make([]int, len(all))
	for i := range order {
		order[i] = i
	}
	depth := func(i int) int { return strings.Count(all[i].Target, "/") }
	slices.SortStableFunc(order, func(a, b int) int { return depth(a) - depth(b) })
	return order
}

// mountOne mounts one directory. It is served until serving is done.
func (s *Session) mountOne(ctx, serving context.Context, link *agent.Link, number int) error {
	mount := s.spec.Mounts[number]
	order := wire.Mount{
		Number: number, Target: mount.Target, Source: mount.Source, User: s.spec.User,
		ReadOnly: mount.Mode == smolvm.MountReadOnly, Overlay: mount.OverlayName(),
	}
	dir, err := hostdir.Open(mount.Source, hostdir.Options{
		ReadOnly: mount.Mode != smolvm.MountReadWrite, NoXattr: order.Overlay != "",
	})
	if err != nil {
		return fmt.Errorf("mount at %s: %w", mount.Target, err)
	}
	s.mounts.add(dir)
	conn, owner, err := link.Mount(ctx, order)
	if err != nil {
		return err
	}
	dir.SetOwner(owner.UID, owner.GID)
	s.mounts.serve(func() {
		if err := dir.Serve(serving, conn); err != nil {
			s.log.Warn("a directory of the host is not served any more", "mount", mount.Target, "error", err)
		}
	})
	return nil
}
