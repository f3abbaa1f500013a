package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

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
	owner  wire.Owner

	// target and overlay are where its overlay is to be, and under which name its changes are kept;
	// empty: it has none. Merged is a descriptor of the overlay's root once it is mounted.
	target, overlay string
	merged          int
}

// drop ends all mounts: what was restored is not connected to what the guest had mounted when it
// was saved. Programs that have files of it open get errors from now on.
func (m *hostMounts) drop() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for _, mount := range slices.Backward(m.mounts) { // the later ones may be in earlier ones
		errs = append(errs, mount.fs.Abort())
	}
	for _, mount := range m.mounts {
		if mount.merged != 0 {
			errs = append(errs, unix.Unmount(fmt.Sprintf("/proc/self/fd/%d", mount.merged), unix.MNT_DETACH), unix.Close(mount.merged))
		}
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
	if wire.Write(conn, wire.ControlAnswer{Owner: mount.owner}) == nil {
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
	mount := &hostMount{number: order.Number, overlay: order.Overlay, target: order.Target}
	if order.User != "" {
		user, err := findUser(order.User)
		if err != nil {
			return nil, err
		}
		mount.owner = wire.Owner{UID: user.uid, GID: user.gid}
	}
	at := order.Target
	if order.Overlay != "" {
		if !isName(order.Overlay) {
			return nil, fmt.Errorf("%q is no name of an overlay", order.Overlay)
		}
		at = filepath.Join(lowersDir, order.Overlay)
	}
	for _, dir := range []string{order.Target, at} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	fs, err := fuserelay.Mount(at, fuserelay.Options{ReadOnly: order.ReadOnly, Source: order.Source})
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("the guest's kernel has no FUSE, by which directories of the host are mounted: %w", err)
	}
	if err != nil {
		return nil, err
	}
	mount.fs = fs
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
		if mount.overlay != "" && mount.merged == 0 {
			if err := m.overlay(mount); err != nil {
				return fmt.Errorf("mount an overlay at %s: %w", mount.target, err)
			}
		}
	}
	return nil
}

const (
	// overlaysDir has what the guest changes in directories of the host whose changes are kept apart,
	// as the upper directories of overlays; lowersDir is where these directories are mounted.
	overlaysDir = "/.smolvm-overlays"
	lowersDir   = "/run/smolvm-lowers"
)

// overlay mounts the overlay of a directory of the host.
func (m *hostMounts) overlay(mount *hostMount) error {
	if err := m.modules.load("overlay"); err != nil {
		return err
	}
	lower, dir := filepath.Join(lowersDir, mount.overlay), filepath.Join(overlaysDir, mount.overlay)
	upper, work := filepath.Join(dir, upperName), filepath.Join(dir, workName)
	for path, mode := range map[string]os.FileMode{overlaysDir: 0o700, work: 0o755, upper: 0o755} {
		if err := os.MkdirAll(path, mode); err != nil {
			return err
		}
	}
	if err := copyOwnerAndMode(lower, upper); err != nil {
		return err
	}
	if err := unix.Mount("overlay", mount.target, "overlay", unix.MS_NOSUID|unix.MS_NODEV, overlayOptions(lower, upper, work)); err != nil {
		return err
	}
	merged, err := unix.Open(mount.target, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	mount.merged = merged
	return err
}

// any reports whether a directory of the host is mounted.
func (m *hostMounts) any() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.mounts) > 0
}
