package imagebuild

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/stream"
)

// maxSecret is how long a secret may be, in bytes, as in docker.
const maxSecret = 500 << 10

// run makes the layer of a command.
func (s *stage) run(ctx context.Context, op *dockerfile.Run, out io.Writer) (result ocistore.CachedLayer, err error) {
	if err := s.open(ctx); err != nil {
		return result, err
	}
	command := Command{Args: op.Args, Env: slices.Concat(op.Proxy, op.Env), Dir: op.Dir, User: op.User, Stdout: out, Stderr: out, NoNetwork: op.NoNetwork}
	mounts := &mounts{stage: s, command: &command, caches: map[string]string{}}
	defer func() { err = errors.Join(err, mounts.drop(ctx, err == nil)) }()
	if err := mounts.lock(ctx, op.Mounts); err != nil {
		return result, err
	}
	for i, mount := range op.Mounts {
		if err := mounts.add(ctx, i, mount); err != nil {
			return result, fmt.Errorf("--mount=type=%s: %w", mount.Type, err)
		}
	}
	status, err := s.work.Run(ctx, command)
	if err != nil {
		return result, err
	}
	if !status.Success() {
		return result, fmt.Errorf("the command %q has failed: %s", strings.Join(op.Args, " "), status)
	}
	result, err = s.store(ctx, s.work.Layer)
	if err == nil && result.Layer.Digest != "" {
		s.workLayers = len(s.layers) + 1
	}
	return result, err
}

// open has a workspace with all layers so far: a new one, or the one that is there, into which
// those are put that it has not.
func (s *stage) open(ctx context.Context) error {
	if s.work == nil {
		work, err := s.opts.Workspaces.Open(ctx, s.layers)
		if err != nil {
			return fmt.Errorf("open a VM to run it in: %w", err)
		}
		s.work, s.workLayers = work, len(s.layers)
	}
	for ; s.workLayers < len(s.layers); s.workLayers++ {
		if err := s.putLayer(ctx, s.layers[s.workLayers]); err != nil {
			return fmt.Errorf("put layer into the VM: %w", err)
		}
	}
	return nil
}

// putLayer puts a layer into the workspace, and no part of it into the next.
func (s *stage) putLayer(ctx context.Context, layer ocistore.Layer) error {
	content, err := files.OpenArchive(func() (io.ReadCloser, error) { return s.opts.Store.OpenLayer(layer) })
	if err != nil {
		return err
	}
	defer func() { _ = content.Close() }()
	if err := s.work.Put(ctx, "/", content); err != nil {
		return err
	}
	return s.work.Layer(ctx, io.Discard)
}

// mounts are what is mounted for one command.
type mounts struct {
	*stage
	command *Command
	// areas are the areas that were filled, and caches those of them that are kept, by the ids
	// of the caches.
	areas  []string
	caches map[string]string
	unlock []func()
}

// lock keeps others from the caches that are mounted: in order, so that no two wait for each other.
func (m *mounts) lock(ctx context.Context, mounts []dockerfile.Mount) error {
	ids := map[string]bool{}
	for _, mount := range mounts {
		if mount.Type == dockerfile.MountCache {
			ids[mount.ID] = true
		}
	}
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		unlock, err := m.opts.Caches.LockCache(ctx, id)
		if err != nil {
			return err
		}
		m.unlock = append(m.unlock, unlock)
	}
	return nil
}

// inArea is the name of what is mounted in its area, whose root has an owner and a mode of its own.
const inArea = "mount"

// areaLayer returns a layer for an area.
func (m *mounts) areaLayer() *newLayer {
	return newLayerOver(files.Empty(), owner{}, m.fileTime())
}

// add adds a mount to the command.
func (m *mounts) add(ctx context.Context, number int, mount dockerfile.Mount) error {
	area := fmt.Sprintf("mount-%d", number)
	added := AreaMount{Area: area, Target: mount.Target, ReadOnly: mount.ReadOnly, Size: mount.Size}
	var err error
	switch mount.Type {
	case dockerfile.MountTmpfs:
		added.Area = ""
	case dockerfile.MountSecret:
		added.Source, err = m.addSecret(ctx, area, mount)
		if err != nil || added.Source == "" {
			return err
		}
	case dockerfile.MountCache:
		added.Source = inArea
		if before, ok := m.caches[mount.ID]; ok {
			added.Area = before // twice in one command
			break
		}
		err = m.addCache(ctx, area, mount)
	default:
		added.Source, err = m.addBind(ctx, area, mount)
	}
	if err != nil {
		return err
	}
	m.command.Mounts = append(m.command.Mounts, added)
	return nil
}

// fill puts the archive of a layer into an area.
func (m *mounts) fill(ctx context.Context, area string, inMemory bool, write func(ctx context.Context, w io.Writer) error) error {
	m.areas = append(m.areas, area)
	return stream.Feed(ctx, write, func(r io.Reader) error { return m.work.PutArea(ctx, area, inMemory, r) })
}

// addSecret puts a secret into memory, and returns its name there: empty if there is no file.
func (m *mounts) addSecret(ctx context.Context, area string, mount dockerfile.Mount) (string, error) {
	value, ok, err := m.opts.Secrets(mount.ID)
	switch {
	case err != nil:
		return "", fmt.Errorf("secret %q: %w", mount.ID, err)
	case !ok && mount.Required:
		return "", &smolvm.Error{Err: fmt.Errorf("there is no secret %q, and it is required", mount.ID), Hint: fmt.Sprintf("give it by `--secret id=%s,src=FILE`", mount.ID)}
	case !ok:
		return "", nil
	case len(value) > maxSecret:
		return "", fmt.Errorf("secret %q has %d bytes, more than %d", mount.ID, len(value), maxSecret)
	}
	if mount.Env != "" {
		if slices.Contains(value, 0) {
			return "", fmt.Errorf("secret %q has a NUL, and can't be a variable", mount.ID)
		}
		m.command.Env = append(m.command.Env, mount.Env+"="+string(value))
	}
	if mount.Target == "" {
		return "", nil
	}
	layer := m.areaLayer()
	file := files.File{Mode: unix.S_IFREG | mount.Mode, UID: mount.UID, GID: mount.GID, Size: int64(len(value)), ModTime: m.fileTime()}
	if err := layer.put(inArea, file, item{open: inMemory(value)}); err != nil {
		return "", err
	}
	return inArea, m.fill(ctx, area, true, layer.write)
}

// addBind puts what is mounted into an area, and returns its path there.
func (m *mounts) addBind(ctx context.Context, area string, mount dockerfile.Mount) (string, error) {
	layer := m.areaLayer()
	for _, file := range mount.Files {
		made := files.File{Mode: unix.S_IFREG | file.Mode, Size: int64(len(file.Content)), ModTime: m.fileTime()}
		if err := errors.Join(layer.makeDirs(inArea), layer.put(path.Join(inArea, file.Name), made, item{open: inMemory([]byte(file.Content))})); err != nil {
			return "", err
		}
	}
	if len(mount.Files) == 0 {
		one, err := m.mounted(ctx, mount)
		if err != nil {
			return "", err
		}
		for _, item := range one.items {
			if err := layer.put(path.Join(inArea, item.name), change{time: m.limitTime}.apply(item.file), item); err != nil {
				return "", err
			}
		}
	}
	return inArea, m.fill(ctx, area, false, layer.write)
}

// mounted finds what a mount has.
func (m *mounts) mounted(ctx context.Context, mount dockerfile.Mount) (selection, error) {
	tree, err := m.source(ctx, mount.From)
	if err != nil {
		return selection{}, err
	}
	selected, err := m.selectFiles(ctx, tree, []string{mount.Path}, nil)
	if err != nil {
		return selection{}, err
	}
	if len(selected) != 1 {
		return selection{}, fmt.Errorf("%q stands for %d files, and one can be mounted", mount.Path, len(selected))
	}
	return selected[0], nil
}

// addCache puts what a cache has into an area. One that has nothing begins with what it is mounted
// from, or as an empty directory.
func (m *mounts) addCache(ctx context.Context, area string, mount dockerfile.Mount) error {
	kept, err := m.opts.Caches.OpenCache(mount.ID)
	if err != nil {
		return err
	}
	m.caches[mount.ID] = area
	if kept != nil {
		defer func() { _ = kept.Close() }()
		return m.fill(ctx, area, false, func(_ context.Context, w io.Writer) error {
			_, err := io.Copy(w, kept)
			return err
		})
	}
	layer := m.areaLayer()
	layer.added[inArea] = placed{file: files.File{Mode: unix.S_IFDIR | mount.Mode, UID: mount.UID, GID: mount.GID, ModTime: m.fileTime()}}
	if !mount.From.Scratch {
		one, err := m.mounted(ctx, mount)
		if err != nil {
			return err
		}
		if err := layer.copyDir(one.items, inArea, change{time: m.limitTime}); err != nil {
			return err
		}
	}
	return m.fill(ctx, area, false, layer.write)
}

// drop keeps what is in caches, also when the command has failed, as in docker, and gives up all
// that was mounted.
func (m *mounts) drop(ctx context.Context, whole bool) error {
	defer func() {
		for _, unlock := range m.unlock {
			unlock()
		}
	}()
	if ctx.Err() != nil {
		return nil // the workspace goes, with all of it
	}
	var errs []error
	for _, id := range slices.Sorted(maps.Keys(m.caches)) {
		area := m.caches[id]
		if err := m.opts.Caches.SetCache(id, func(w io.Writer) error { return m.work.Area(ctx, area, w) }); err != nil && whole {
			errs = append(errs, fmt.Errorf("keep cache %q: %w", id, err))
		}
	}
	for _, area := range m.areas {
		if err := m.work.DropArea(ctx, area); err != nil && whole {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
