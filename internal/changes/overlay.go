package changes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/diskspace"
)

// Overlay is what a guest has changed in one directory of the host.
type Overlay struct {
	mount   smolvm.Mount
	root    *os.Root
	spool   *os.File
	archive Archive
	plan    *Plan
}

// Source is where the changes of an overlay come from.
type Source struct {
	// Mount is the overlay, and Mounts are all that the guest has.
	Mount  smolvm.Mount
	Mounts []smolvm.Mount
	// Send has the guest write its changes as an archive.
	Send func(ctx context.Context, w io.Writer) error
	// TempDir is a directory for the archive, which may have Limit bytes.
	TempDir string
	Limit   int64
}

// Fetch gets what a guest has changed in a directory of the host, and compares it with that. The
// caller closes what it returns.
func Fetch(ctx context.Context, from Source) (*Overlay, error) {
	root, err := os.OpenRoot(from.Mount.Source)
	if err != nil {
		return nil, err
	}
	spool, err := os.CreateTemp(from.TempDir, ".changes-")
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	o := &Overlay{mount: from.Mount, root: root, spool: spool}
	if err := o.fill(ctx, from); err != nil {
		o.Close()
		return nil, err
	}
	return o, nil
}

func (o *Overlay) fill(ctx context.Context, from Source) error {
	if err := os.Remove(o.spool.Name()); err != nil { // it ends with this process
		return err
	}
	if err := from.Send(ctx, &boundedFile{file: o.spool, left: from.Limit}); err != nil {
		return err
	}
	size, err := o.spool.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	o.archive = Archive{File: o.spool, Size: size}
	o.plan, err = Scan(ctx, o.archive, o.root, Options{Since: o.mount.Since, Ignore: mountedIn(from.Mounts, o.mount)})
	return err
}

// Close forgets the changes.
func (o *Overlay) Close() {
	_ = o.root.Close()
	_ = o.spool.Close()
}

// Changes returns the changes, with their paths in the guest.
func (o *Overlay) Changes() []smolvm.Change {
	all := make([]smolvm.Change, 0, len(o.plan.Changes))
	for _, change := range o.plan.Changes {
		change.Path = path.Join(o.mount.Target, change.Path)
		all = append(all, change)
	}
	return all
}

// CheckConflicts returns an error that names what has changed on the host too; nil if nothing has.
func (o *Overlay) CheckConflicts() error {
	const shown = 5
	conflicts := o.plan.Conflicts
	if len(conflicts) == 0 {
		return nil
	}
	list := strings.Join(conflicts[:min(len(conflicts), shown)], ", ")
	if more := len(conflicts) - shown; more > 0 {
		list += fmt.Sprintf(" and %d more", more)
	}
	return &smolvm.Error{
		Hint: "compare them first; `smolvm apply --force` takes the guest's",
		Err:  fmt.Errorf("%s: both the guest and the host have changed %s", o.mount.Source, list),
	}
}

// Apply brings the changes to the host's directory, as [Apply] does.
func (o *Overlay) Apply(ctx context.Context) error { return Apply(ctx, o.archive, o.root, o.plan) }

// mountedIn returns where others are mounted in a mount, as paths in it.
func mountedIn(all []smolvm.Mount, in smolvm.Mount) []string {
	var paths []string
	for _, mount := range all {
		if below, ok := strings.CutPrefix(mount.Target, in.Target+"/"); ok {
			paths = append(paths, below)
		}
	}
	return paths
}

// boundedFile writes what a guest sends to a file, as long as there is room on the disk, and not
// more than it may send.
type boundedFile struct {
	file *os.File
	left int64
	room diskspace.Room
}

// Write implements [io.Writer].
func (b *boundedFile) Write(p []byte) (int, error) {
	if b.left -= int64(len(p)); b.left < 0 {
		return 0, errors.New("the guest sends more than its disk holds")
	}
	if err := b.room.Take(int(b.file.Fd()), int64(len(p))); err != nil {
		return 0, fmt.Errorf("keep what the guest sends: %w", err)
	}
	return b.file.Write(p)
}
