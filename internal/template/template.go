// Package template keeps templates: guests of one kind that were saved before anybody wanted
// them, so that the start of a VM is a clone.
//
// A template is a snapshot of a guest that has booted, run what its kind asks for, and has no
// identity. Whoever makes the templates of a kind holds the lock of that kind.
package template

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/budget"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/snapshot"
	"github.com/smolvm/smolvm/internal/step"
)

// Templates are those of a data directory.
type Templates struct {
	Dir      *datadir.Dir
	Saved    *snapshot.Store
	Disks    *backing.Disks
	Machines *machine.Builder
	Budget   *budget.Budget
	// Program returns the program that serves as shim, with its arguments.
	Program func() ([]string, error)
	// HostBootID names the host's present boot; empty if that is not known.
	HostBootID func() string
	// LogPath is the log of the shims that make templates.
	LogPath string
	// MaxBytes is how much of the disk templates may take together.
	MaxBytes int64
	// Note records an event of a template.
	Note func(ctx context.Context, id, action string, began time.Time, detail string)
}

// meta is what is kept with a template.
type meta struct {
	Kind   Kind            `json:"recipe"`
	Config smolvm.VMConfig `json:"config"`
}

// Open opens a template. The error matches [smolvm.ErrNotFound] if there is none of that id.
func (t *Templates) Open(id string) (snapshot.Snapshot, Kind, error) {
	found, err := t.Saved.Get(id)
	if err != nil {
		return found, Kind{}, err
	}
	kind, err := kindIn(found)
	return found, kind, err
}

func kindIn(found snapshot.Snapshot) (Kind, error) {
	var m meta
	if err := json.Unmarshal(found.Meta, &m); err != nil {
		return Kind{}, fmt.Errorf("template %s: %w", found.Name, err)
	}
	return m.Kind, nil
}

// Find returns the template of a kind, and verifies it. One that is damaged is removed, and
// named in a warning. The error matches [smolvm.ErrTemplateNotFound] if there is none.
func (t *Templates) Find(ctx context.Context, k Kind) (found snapshot.Snapshot, warnings []string, err error) {
	paths, err := glob.In(t.Dir.Templates(), k.Key()+"-*")
	if err != nil {
		return found, nil, err
	}
	for _, path := range paths {
		one, err := t.Saved.Get(filepath.Base(path))
		if err == nil {
			err = t.Saved.Verify(ctx, one, t.HostBootID())
		}
		if ctx.Err() != nil {
			return found, warnings, context.Cause(ctx)
		}
		if err == nil {
			return one, warnings, nil
		}
		warnings = append(warnings, "template: "+err.Error())
		t.Drop(ctx, filepath.Base(path))
	}
	return found, warnings, notFound(k)
}

func notFound(k Kind) error {
	return fmt.Errorf("template of kind %s: %w", k.Key(), smolvm.ErrTemplateNotFound)
}

// Drop removes a template that is of no use. VMs that were cloned from it go on: they have
// its memory mapped, and its disk is a layer.
func (t *Templates) Drop(ctx context.Context, id string) {
	_ = os.RemoveAll(filepath.Join(t.Dir.Templates(), id))
	_ = t.Disks.Collect(ctx)
}

// openLock opens the file whose lock is held by whoever makes the templates of a kind.
func (t *Templates) openLock(k Kind) (*os.File, error) {
	return os.OpenFile(filepath.Join(t.Dir.Templates(), ".lock-"+k.Key()), os.O_CREATE|os.O_RDWR, 0o600)
}

// Lock waits for the lock of a kind. Closing the file unlocks it.
func (t *Templates) Lock(ctx context.Context, k Kind) (*os.File, error) {
	lock, err := t.openLock(k)
	if err != nil {
		return nil, err
	}
	if err := flock.Lock(ctx, lock); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// Await returns the template of a kind, and waits for one that is just being made: it has
// been begun earlier than a boot that began now. If there is none, and nobody makes one, it
// returns the kind's lock, under which the caller has one made, or which it closes.
func (t *Templates) Await(ctx context.Context, k Kind) (found snapshot.Snapshot, lock *os.File, warnings []string, err error) {
	found, warnings, err = t.Find(ctx, k)
	if !errors.Is(err, smolvm.ErrTemplateNotFound) {
		return found, nil, warnings, err
	}
	if lock, err = t.openLock(k); err != nil {
		return found, nil, warnings, err
	}
	if flock.TryLock(lock) == nil {
		// It may have been made since we looked.
		if again, _, err := t.Find(ctx, k); err == nil {
			return again, nil, warnings, lock.Close()
		}
		return found, lock, warnings, notFound(k)
	}
	if err := flock.Lock(ctx, lock); err != nil {
		return found, nil, warnings, errors.Join(err, lock.Close())
	}
	_ = lock.Close()
	found, more, err := t.Find(ctx, k)
	return found, nil, append(warnings, more...), err
}

// List returns the templates, the oldest first.
func (t *Templates) List() ([]smolvm.Template, error) {
	all, err := t.Saved.List()
	if err != nil {
		return nil, err
	}
	templates := make([]smolvm.Template, 0, len(all))
	for _, one := range all {
		if info, err := t.Info(one); err == nil {
			templates = append(templates, info)
		}
	}
	return templates, nil
}

// Info returns what users get to see of a template.
func (t *Templates) Info(found snapshot.Snapshot) (smolvm.Template, error) {
	k, err := kindIn(found)
	if err != nil {
		return smolvm.Template{}, err
	}
	return smolvm.Template{
		ID: found.Name, Image: k.Image, VCPUs: k.Hardware.VCPUs, MemoryMiB: k.Hardware.MemoryMiB,
		DiskSizeMiB: k.DiskSizeMiB, WarmUp: k.WarmUp, Network: k.Hardware.NIC.Mode(), Backend: k.Hardware.Backend, Accelerator: k.Hardware.Accelerator,
		Stale: t.stale(k), Size: found.Size, CreatedAt: found.CreatedAt, UsedAt: found.UsedAt,
	}, nil
}

// Remove removes a template. VMs that were cloned from it go on. The error matches
// [smolvm.ErrTemplateNotFound].
func (t *Templates) Remove(ctx context.Context, id string) error {
	err := t.Saved.Remove(id)
	if errors.Is(err, smolvm.ErrNotFound) {
		return &smolvm.Error{Hint: "`smolvm template ls` lists the templates", Err: fmt.Errorf("%w: %q", smolvm.ErrTemplateNotFound, id)}
	}
	step.Reached(ctx, "template rm/removed")
	return errors.Join(err, t.Disks.Collect(ctx))
}

// Prune removes the templates that no VM will be cloned from any more, and of the rest the
// least recently used until they take at most maxBytes. It returns the ids of those that it
// has removed.
func (t *Templates) Prune(ctx context.Context, maxBytes int64) ([]string, error) {
	removed := []string{}
	all, err := t.List()
	if err != nil {
		return removed, err
	}
	var errs []error
	slices.SortFunc(all, func(a, b smolvm.Template) int { return b.UsedAt.Compare(a.UsedAt) })
	var size int64
	for _, one := range all {
		if size += one.Size; !one.Stale && size <= maxBytes {
			continue
		}
		size -= one.Size
		if err := t.Remove(ctx, one.ID); err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, one.ID)
	}
	errs = append(errs, glob.Remove(t.Dir.Templates(), failurePrefix+"*"), t.Saved.Clean())
	return removed, errors.Join(errs...)
}
