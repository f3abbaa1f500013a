package session

import (
	"context"
	"errors"

	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/shim"
)

// captures are the copies of drives' files that are made as the files are when the guest is
// saved.
type captures []*disk.Capture

// beginCaptures copies what can be copied while the guest runs.
func beginCaptures(ctx context.Context, drives []shim.SavedDrive) (captures, error) {
	var all captures
	for _, drive := range drives {
		if drive.Copy == "" {
			continue
		}
		one, err := disk.BeginCapture(ctx, drive.Copy, drive.Path)
		if err != nil {
			return nil, errors.Join(err, all.close())
		}
		all = append(all, one)
	}
	return all, nil
}

// prepare makes it short to finish the copies soon after.
func (c captures) prepare() error {
	var errs []error
	for _, one := range c {
		errs = append(errs, one.Prepare())
	}
	return errors.Join(errs...)
}

// finish makes the copies what the files are now, while the guest is held.
func (c captures) finish(ctx context.Context) error {
	var errs []error
	for _, one := range c {
		errs = append(errs, one.Finish(ctx))
	}
	return errors.Join(errs...)
}

// close removes the copies that are not finished.
func (c captures) close() error {
	var errs []error
	for _, one := range c {
		errs = append(errs, one.Close())
	}
	return errors.Join(errs...)
}
