// Package ocilayer unpacks the layers of an OCI image to a tree: not one of the host, but one
// in memory, whose files have their content in a file system that is being written. So any
// owner, mode, device and name can be unpacked without root, and nothing of an image becomes a
// file of the host.
//
// The tree is what containerd makes of the same layers, in all that an image can rely on.
// Layers are hostile: they are bounded, and what can't be done as it says is refused.
package ocilayer

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/smolvm/smolvm/internal/image/decompress"
	"github.com/smolvm/smolvm/internal/image/ext4fs"
	"github.com/smolvm/smolvm/internal/image/readahead"
)

// Layer is a layer of an image.
type Layer struct {
	// Open opens its archive, packed by gzip or zstd, or not packed: its first bytes tell.
	Open func() (io.ReadCloser, error)
	// DiffID is the digest of the unpacked archive: sha256:….
	DiffID string
}

// Limits bound what layers may make. Zeros stand for the defaults.
type Limits struct {
	// Entries is how many entries all layers may have together. Default: [DefaultEntries].
	Entries int
	// Bytes is how many bytes all layers may have together when they are unpacked, and how many
	// all their files, with holes. Default: [DefaultBytes].
	Bytes int64
}

// The defaults of [Limits].
const (
	DefaultEntries = 2_000_000
	DefaultBytes   = 64 << 30
)

// Content takes the content of files, and gives it up again.
type Content interface {
	Add(r io.Reader, size int64) (ext4fs.Data, error)
	Free(data ext4fs.Data) error
}

// Progress is told how many bytes of which layer, counted from 0, have been read as they are
// stored.
type Progress func(layer int, bytes int64)

// ErrLimit reports that layers make more than they may.
var ErrLimit = errors.New("more than an image may have")

// DiffIDError reports a layer that is not what the image's configuration says.
type DiffIDError struct {
	Layer     int // counted from 0
	Want, Got string
}

func (e *DiffIDError) Error() string {
	return fmt.Sprintf("its content is %s, and not %s", e.Got, e.Want)
}

// Unpack unpacks layers, the lowest first, and returns the root of the tree that they make.
// Progress may be nil.
func Unpack(ctx context.Context, layers []Layer, to Content, limits Limits, progress Progress) (*ext4fs.Node, error) {
	if progress == nil {
		progress = func(int, int64) {}
	}
	t := NewTree(to, limits)
	for i, layer := range layers {
		if err := t.AddLayer(ctx, layer, func(bytes int64) { progress(i, bytes) }); err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err)
		}
	}
	return t.Root(), nil
}

// Tree is a tree to which layers are added, one by one. One to which something could not be
// added is of no use.
type Tree struct {
	tree  *tree
	left  budget
	count int
}

// NewTree returns a tree that has a root only. The limits are for all that is added.
func NewTree(to Content, limits Limits) *Tree {
	return &Tree{tree: newTree(to), left: newBudget(limits)}
}

// Root returns the root of the tree, which changes with what is added.
func (t *Tree) Root() *ext4fs.Node { return t.tree.root }

// AddLayer adds a layer. Progress is told how many bytes of it, as it is stored, have been read;
// it may be nil.
func (t *Tree) AddLayer(ctx context.Context, layer Layer, progress func(bytes int64)) error {
	if progress == nil {
		progress = func(int64) {}
	}
	got, err := unpackLayer(ctx, t.tree, layer, &t.left, progress)
	if err == nil && got != layer.DiffID {
		err = &DiffIDError{Layer: t.count, Want: layer.DiffID, Got: got}
	}
	t.count++
	return err
}

// AddArchive adds the files of an archive that is no layer, so that nothing in it hides a file.
// It is packed by gzip or zstd, or not packed.
func (t *Tree) AddArchive(ctx context.Context, open func() (io.ReadCloser, error)) error {
	t.tree.plain = true
	defer func() { t.tree.plain = false }()
	_, err := unpackLayer(ctx, t.tree, Layer{Open: open}, &t.left, func(int64) {})
	return err
}

// budget is what may still come.
type budget struct {
	entries int
	// bytes are those of archives, and content those of files: an archive may say of a file
	// that nearly all of it is holes.
	bytes, content int64
}

func newBudget(limits Limits) budget {
	bytes := cmp.Or(limits.Bytes, DefaultBytes)
	return budget{entries: cmp.Or(limits.Entries, DefaultEntries), bytes: bytes, content: bytes}
}

// take takes an entry off the budget.
func (b *budget) take(header *tar.Header) error {
	if b.entries--; b.entries < 0 {
		return fmt.Errorf("the layers have more files: %w", ErrLimit)
	}
	if b.content -= max(header.Size, 0); b.content < 0 {
		return fmt.Errorf("the layers have files of more bytes: %w", ErrLimit)
	}
	return nil
}

// unpackLayer applies a layer, and returns the digest of its archive.
func unpackLayer(ctx context.Context, t *tree, layer Layer, left *budget, progress func(int64)) (string, error) {
	file, err := layer.Open()
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	packed := bufio.NewReaderSize(&counter{r: file, tell: progress}, 1<<20)
	unpacked, err := decompress.Detect(packed, decompress.Gzip, decompress.Zstd)
	if err != nil {
		return "", err
	}
	defer func() { _ = unpacked.Close() }()
	// It is unpacked ahead, as that and what follows take about as long as each other.
	ahead := readahead.New(ctx, unpacked)
	defer ahead.Stop()
	summed := &summer{r: ahead, hash: sha256.New(), left: &left.bytes}
	if err := t.apply(ctx, tar.NewReader(summed), left); err != nil {
		return "", err
	}
	// What follows the archive's end is part of what has the digest.
	if _, err := io.Copy(io.Discard, summed); err != nil {
		return "", err
	}
	return "sha256:" + hex.EncodeToString(summed.hash.Sum(nil)), nil
}

// counter is a reader that tells how much was read.
type counter struct {
	r    io.Reader
	done int64
	tell func(int64)
}

func (c *counter) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.done += int64(n)
	c.tell(c.done)
	return n, err
}

// summer is a reader that hashes what it reads, and reads no more than there may be.
type summer struct {
	r    io.Reader
	hash hash.Hash
	left *int64
}

func (s *summer) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	if *s.left -= int64(n); *s.left < 0 {
		return 0, fmt.Errorf("unpacked, the layers have %w", ErrLimit)
	}
	s.hash.Write(b[:n])
	return n, err
}
