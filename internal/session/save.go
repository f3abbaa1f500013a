package session

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/vmm"
)

const (
	// syncTime bounds how long a guest may take to write out its file systems before
	// it is saved. One that takes longer is saved as it is: its memory has the rest.
	syncTime = 10 * time.Second
	// clockTime bounds how long a guest may take to have its clock set.
	clockTime = 5 * time.Second
)

// Pause holds the guest.
func (s *Session) Pause(ctx context.Context) error {
	pauser, err := s.pauser()
	if err != nil {
		return err
	}
	if err := pauser.Pause(ctx); err != nil {
		return err
	}
	s.setPaused(true)
	return nil
}

// Resume lets a guest go on, and tells it how late it is.
func (s *Session) Resume(ctx context.Context) error {
	pauser, err := s.pauser()
	if err != nil {
		return err
	}
	halted := s.halts.clear()
	s.setPaused(false) // before it may be halted again
	if err := pauser.Resume(ctx); err != nil {
		s.setPaused(true)
		return err
	}
	if halted {
		select {
		case <-s.halts.halted():
			return s.halts.err()
		case <-time.After(haltTime):
		}
	}
	link := s.line.current()
	if link == nil || s.afterHold() { // it is told the time with who it is
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, clockTime)
	defer cancel()
	return link.SetClock(ctx, time.Now())
}

func (s *Session) setPaused(paused bool) {
	s.paused.Store(paused)
	if paused {
		s.holds.Add(1)
	}
	if link := s.line.current(); link != nil {
		link.SetHeld(paused)
	}
}

func (s *Session) pauser() (vmm.Pauser, error) {
	pauser, ok := s.instance.(vmm.Pauser)
	if !ok {
		return nil, fmt.Errorf("pause: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend)
	}
	return pauser, nil
}

// Save saves the guest, which goes on. A guest whose drives have got overlays has them for good, so
// they take their names even if the saving fails after that.
func (s *Session) Save(ctx context.Context, save *shim.Save) (result shim.Saved, err error) {
	saver, ok := s.instance.(vmm.Saver)
	if !ok || save == nil {
		return shim.Saved{}, fmt.Errorf("save a guest: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend)
	}
	if len(s.spec.Mounts) > 0 && s.resetsChannel() {
		return shim.Saved{}, errors.Join(fmt.Errorf("save a guest with directories of the host: %w by backend %s, which resets the guest channel then: what the guest is asking for in them would be lost",
			smolvm.ErrUnsupported, s.spec.Backend), removeOverlays(save.Drives))
	}
	s.saving.Lock()
	defer s.saving.Unlock()
	disks, err := s.openOverlays(ctx, save.Drives)
	if err != nil {
		return shim.Saved{}, errors.Join(err, removeOverlays(save.Drives))
	}
	defer func() { err = errors.Join(err, disks.drop()) }()
	copies, err := beginCaptures(ctx, save.Drives)
	if err != nil {
		return shim.Saved{}, err
	}
	defer func() { err = errors.Join(err, copies.close()) }()
	if s.line.current() != nil && !s.paused.Load() {
		err := s.sync(ctx)
		if result.Synced = err == nil; err != nil {
			s.log.Warn("the guest was not synced before it was saved", "error", err)
		}
	}
	if link := s.line.current(); link != nil {
		link.SetHeld(true) // for a part of the time, and nobody knows how long
		defer func() { link.SetHeld(s.paused.Load()) }()
	}
	if err := copies.prepare(); err != nil {
		return result, err
	}
	hold, err := saver.Save(ctx, vmm.SaveOptions{Memory: save.Memory, State: save.State})
	if err != nil {
		s.checkLink()
		return result, err
	}
	s.afterSave()
	if err = copies.finish(ctx); err == nil {
		err = disks.use(ctx)
	}
	saved := hold.Saved()
	result.Held = saved.Held
	var goOnErr error
	if result.Pause, goOnErr = hold.Release(ctx); goOnErr == nil {
		s.afterHold()
	}
	if err != nil || goOnErr != nil {
		return result, errors.Join(err, goOnErr, os.Remove(save.Memory), os.Remove(save.State))
	}
	s.log.Info("the guest was saved", "held", result.Pause, "reread", saved.Reread, "stale", saved.Stale, "early", saved.Early)
	return result, nil
}

// sync has the guest write out its file systems.
func (s *Session) sync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, syncTime)
	defer cancel()
	link, err := s.agentLink(ctx)
	if err != nil {
		return err
	}
	return link.Sync(ctx)
}

// SaveLast saves the guest, which is held from then on: it is to be ended.
func (s *Session) SaveLast(ctx context.Context, memory, state string) error {
	saver, ok := s.instance.(vmm.Saver)
	if !ok {
		return fmt.Errorf("save a guest: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend)
	}
	_, err := saver.Save(ctx, vmm.SaveOptions{Memory: memory, State: state})
	return err
}

// overlays are those that drives get when the guest is saved.
type overlays struct {
	drives []shim.SavedDrive
	open   vmm.DiskSwitch // nil: there are none
	used   bool
}

// openOverlays has the VMM open the overlays of drives.
func (s *Session) openOverlays(ctx context.Context, drives []shim.SavedDrive) (*overlays, error) {
	drives = slices.DeleteFunc(slices.Clone(drives), func(d shim.SavedDrive) bool { return d.Copy != "" })
	o := &overlays{drives: drives}
	if len(drives) == 0 {
		return o, nil
	}
	switcher, ok := s.instance.(vmm.DiskSwitcher)
	if !ok {
		return nil, fmt.Errorf("save a guest with disks: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend)
	}
	var files []vmm.Overlay
	for _, drive := range drives {
		if err := check(drive); err != nil {
			return nil, err
		}
		files = append(files, vmm.Overlay{Drive: drive.Number, Path: drive.Overlay})
	}
	var err error
	o.open, err = switcher.OpenOverlays(ctx, files)
	return o, err
}

// use has the guest, which is held, write to the overlays from now on, and gives these the
// names of the drives' files.
func (o *overlays) use(ctx context.Context) error {
	if o.open == nil {
		return nil
	}
	if err := o.open.Switch(ctx); err != nil {
		return err
	}
	o.used = true
	var errs []error
	for _, drive := range o.drives {
		errs = append(errs, os.Rename(drive.Overlay, drive.Path))
	}
	return errors.Join(errs...)
}

// drop removes overlays that are not used.
func (o *overlays) drop() error {
	if o.open == nil || o.used {
		return nil
	}
	return errors.Join(o.open.Close(), removeOverlays(o.drives))
}

// removeOverlays removes the files of overlays, which the VMM does not have open.
func removeOverlays(drives []shim.SavedDrive) error {
	var errs []error
	for _, drive := range drives {
		if drive.Overlay == "" {
			continue
		}
		if err := os.Remove(drive.Overlay); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// check refuses a saving that would make an overlay of what is not the drive's file any more: another saving,
// whose manager was killed, has got so far meanwhile.
func check(d shim.SavedDrive) error {
	layer, err := os.Stat(d.Layer)
	if err != nil {
		return err
	}
	disk, err := os.Stat(d.Path)
	if err != nil {
		return err
	}
	if !os.SameFile(layer, disk) {
		return fmt.Errorf("the disk %s was put below an overlay meanwhile; try again", d.Path)
	}
	return nil
}
