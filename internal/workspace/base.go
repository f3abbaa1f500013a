package workspace

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/layertar"
	"github.com/smolvm/smolvm/internal/image/ext4fs"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
)

// WriteBase writes the list of what layers make, the lowest first, by which a guest of an image
// of them finds out what it has changed.
func WriteBase(ctx context.Context, w io.Writer, layers []ocilayer.Layer, limits ocilayer.Limits) error {
	root, err := ocilayer.Unpack(ctx, layers, unread{}, limits, nil)
	if err != nil {
		return fmt.Errorf("find out what the image has: %w", err)
	}
	out := bufio.NewWriterSize(w, 64<<10)
	if err := writeKnown(out, "", root); err != nil {
		return err
	}
	return out.Flush()
}

// unread is where the content of files goes that nobody needs.
type unread struct{}

// Add implements [ocilayer.Content].
func (unread) Add(r io.Reader, size int64) (ext4fs.Data, error) {
	_, err := io.Copy(io.Discard, r)
	return ext4fs.Sized(size), err
}

// Free implements [ocilayer.Content].
func (unread) Free(ext4fs.Data) error { return nil }

// writeKnown writes a list of what is in a directory.
func writeKnown(w io.Writer, dir string, n *ext4fs.Node) error {
	for _, name := range slices.Sorted(maps.Keys(n.Children)) {
		child, at := n.Children[name], path.Join(dir, name)
		known := layertar.Known{Mode: child.Mode, UID: child.UID, GID: child.GID, ModTime: child.ModTime.UnixNano(), Device: child.Device, Link: child.Link}
		if child.Mode&unix.S_IFMT == unix.S_IFREG {
			known.Size = child.Data.Size()
		}
		if err := layertar.WriteKnown(w, at, known); err != nil {
			return err
		}
		if err := writeKnown(w, at, child); err != nil {
			return err
		}
	}
	return nil
}
