package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
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

func (s *process) pause(ctx context.Context) error {
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

// resume lets a guest go on, and tells it how late it is.
func (s *process) resume(ctx context.Context) error {
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
	if s.link == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, clockTime)
	defer cancel()
	return s.link.SetClock(ctx, time.Now())
}

func (s *process) setPaused(paused bool) {
	s.paused.Store(paused)
	if s.link != nil {
		s.link.SetHeld(paused)
	}
}

func (s *process) pauser() (vmm.Pauser, error) {
	pauser, ok := s.instance.(vmm.Pauser)
	if !ok {
		return nil, fmt.Errorf("pause: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend)
	}
	return pauser, nil
}

// save saves the guest. A guest whose drives have got overlays has them for good, so
// they take their names even if the saving fails after that.
func (s *process) save(ctx context.Context, save *shim.Save) (result shim.Saved, err error) {
	saver, ok := s.instance.(vmm.Saver)
	if !ok || save == nil {
		return shim.Saved{}, fmt.Errorf("save a guest: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend)
	}
	s.saving.Lock()
	defer s.saving.Unlock()
	var saved vmm.Saved
	defer func() {
		if saved.Switched {
			return
		}
		for _, drive := range save.Drives {
			if removeErr := os.Remove(drive.Overlay); !errors.Is(removeErr, fs.ErrNotExist) {
				err = errors.Join(err, removeErr)
			}
		}
	}()
	options := vmm.SaveOptions{Memory: save.Memory, State: save.State}
	for _, drive := range save.Drives {
		if err := check(drive); err != nil {
			return shim.Saved{}, err
		}
		options.Overlays = append(options.Overlays, make([]string, max(0, drive.Number+1-len(options.Overlays)))...)
		options.Overlays[drive.Number] = drive.Overlay
	}
	if s.link != nil && !s.paused.Load() {
		ctx, cancel := context.WithTimeout(ctx, syncTime)
		err := s.link.Sync(ctx)
		cancel()
		if result.Synced = err == nil; err != nil {
			s.log.Warn("the guest was not synced before it was saved", "error", err)
		}
	}
	options.Switched = func() error { return switched(save.Drives) }
	if s.link != nil {
		s.link.SetHeld(true) // for a part of the time, and nobody knows how long
		defer func() { s.link.SetHeld(s.paused.Load()) }()
	}
	saved, err = saver.Save(ctx, options)
	result.Pause, result.Held = saved.Pause, saved.Held
	if err == nil {
		s.log.Info("the guest was saved", "held", saved.Pause, "reread", saved.Reread, "mended", saved.Mended, "early", saved.Early)
	}
	return result, err
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

// switched gives files the names that they have from now on, when the VMM has taken the
// overlays. It has them open.
func switched(saved []shim.SavedDrive) error {
	var errs []error
	for _, drive := range saved {
		errs = append(errs, os.Rename(drive.Overlay, drive.Path))
	}
	return errors.Join(errs...)
}
