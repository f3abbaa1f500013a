package vmm

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Saver is an Instance whose guest can be saved while it runs.
//
// A guest is saved in steps. Each is a call, so what is to happen while the guest does not
// run (files get other names) happens between two calls:
//
//		            +---- Save fails -----+
//		            v                     |
//		         running ---- Save ---> saved ---- Switch ---> switched
//		            ^                   held                     held
//		            +---- Release --------+-----------------------+
//		         paused <--- Keep --------+-----------------------+
//
//	  - [Saver]'s Save returns with the guest held as it was saved. Until the end of the [Hold]
//	    nobody else can let it go on or pause it.
//	  - [DiskSwitch]'s Switch, for a VM whose drives are to stay as they were at that moment: what
//	    the guest writes from now on goes to other files. They have been opened before, while
//	    the guest ran. A VM without drives, and a backend that can't do it, leave this out.
//	  - Instead of a switch, the files of raw drives may be copied. All that the guest was told
//	    is written is in them from the end of Save on, and the VMM writes to none of them
//	    before the end of the hold.
//	  - [Hold]'s Release has the guest go on, unless it was paused when it was to be saved. Keep
//	    leaves it paused.
//
// The process that takes the steps may be killed at any of them, and the VMM ends with it.
// What is on disk then is whole at each: the drives' files as they were, with overlays in
// which nothing was written, or with those that the guest has written to.
type Saver interface {
	// Save saves the guest's memory and the VMM's state as both are at one moment, from which
	// on the guest is held. On failure it goes on as if nothing had been, and the files are
	// removed. A guest that the VMM has paused by itself, before or meanwhile, is not saved,
	// and stays paused.
	//
	// The guest's channel may be reset by it; see [ChannelResetter].
	Save(ctx context.Context, opts SaveOptions) (*Hold, error)
}

// ChannelResetter is an Instance whose guest channel is reset by its VMM when the guest is saved,
// also in the guest that goes on, and when a restored guest begins to run. The host's end need
// not notice. Whoever has the channel open closes it when a save has succeeded, and opens it again
// when the guest goes on; a channel that was opened to a guest that was just restored may have to
// be opened again as well.
type ChannelResetter interface {
	// ResetsChannel reports whether this VM's channel is one of that kind.
	ResetsChannel() bool
}

// SaveOptions are the options of [Saver].
type SaveOptions struct {
	// Memory and State are the files to make. They must not be there.
	Memory, State string
}

// Hold is a guest that has been saved, and has not run since. It lasts until Release or Keep
// is called, of which all calls but the first do nothing. The VMM may be killed meanwhile.
type Hold struct {
	saved  Saved
	since  time.Time
	resume func(context.Context) error
	end    func()
	once   sync.Once // guards the end
}

// NewHold is for backends. Since is when the guest was held (zero: not known), resume has it
// go on, and end is called once, at the end of the hold.
func NewHold(saved Saved, since time.Time, resume func(context.Context) error, end func()) *Hold {
	return &Hold{saved: saved, since: since, resume: resume, end: end}
}

// Saved returns how the saving went.
func (h *Hold) Saved() Saved { return h.saved }

// Release lets the guest go on if it ran before it was saved, even if ctx is done, and returns
// for how long it has been held; zero if it was held already.
func (h *Hold) Release(ctx context.Context) (held time.Duration, err error) {
	h.once.Do(func() {
		defer h.end()
		if h.saved.Held {
			return
		}
		err = h.resume(context.WithoutCancel(ctx))
		if !h.since.IsZero() {
			held = time.Since(h.since)
		}
	})
	if err != nil {
		return held, fmt.Errorf("let a guest go on that was saved: %w", err)
	}
	return held, nil
}

// Keep leaves the guest paused, as if by [Pauser]'s Pause.
func (h *Hold) Keep() { h.once.Do(h.end) }

// Saved is how a saving went.
type Saved struct {
	// Held reports whether the guest had been paused before. A backend needs to know that
	// when it restores the guest, which goes on in either case.
	Held bool
	// Reread is how many pages of memory were read once more while the guest was held, as
	// the VMM may have missed that the guest wrote to them after they had been saved.
	// Stale is how many of those were not as saved, some of which the VMM did not miss.
	Reread, Stale int
	// Early reports whether they could not be read, and the guest was held for longer
	// instead.
	Early bool
}

// DiskSwitcher is an Instance whose drives can be written to other files from some moment on.
type DiskSwitcher interface {
	// OpenOverlays opens the files to which drives will be written. The guest goes on
	// meanwhile, and nothing changes for it before Switch. On failure none is open.
	OpenOverlays(ctx context.Context, overlays []Overlay) (DiskSwitch, error)
}

// Overlay is the file to which a drive is to be written.
type Overlay struct {
	// Drive is the number of the drive in [Config]. It is not read-only.
	Drive int
	// Path is that of an empty qcow2 overlay. It is one of the drive's file, whatever its
	// header says.
	Path string
}

// CheckOverlays returns an error if a drive is not there, can't be written to, or is named
// twice.
func (c Config) CheckOverlays(overlays []Overlay) error {
	seen := map[int]bool{}
	for _, overlay := range overlays {
		n := overlay.Drive
		switch {
		case n < 0 || n >= len(c.Drives):
			return fmt.Errorf("overlay %s: the VM has no drive %d", overlay.Path, n)
		case c.Drives[n].ReadOnly:
			return fmt.Errorf("overlay %s: the VM can't write to drive %d", overlay.Path, n)
		case seen[n]:
			return fmt.Errorf("overlay %s: drive %d has another one", overlay.Path, n)
		}
		seen[n] = true
	}
	return nil
}

// DiskSwitch is overlays that are open for drives, and not in use yet.
type DiskSwitch interface {
	// Switch has what the guest writes go to the overlays, all or none. The guest is held by
	// a [Hold] from before to after it. Overlays and the drives' files may get other names
	// then, or none.
	Switch(ctx context.Context) error
	// Close closes overlays that are not in use. It is to be called in any case; after
	// Switch it does nothing.
	Close() error
}
