package imagebuild

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	mode "github.com/tonistiigi/dchapes-mode"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/image/ocistore"
)

// copyFiles makes the layer of a COPY or an ADD.
func (s *stage) copyFiles(ctx context.Context, op *dockerfile.Copy) (ocistore.CachedLayer, error) {
	below, err := s.files(ctx)
	if err != nil {
		return ocistore.CachedLayer{}, err
	}
	how, made, err := s.changeOf(op, below)
	if err != nil {
		return ocistore.CachedLayer{}, err
	}
	layer := newLayerOver(below, made, s.fileTime())
	unpacked, err := s.place(ctx, op, layer, how)
	for _, spool := range unpacked {
		defer func() { _ = spool.Close() }()
	}
	if err != nil {
		return ocistore.CachedLayer{}, err
	}
	return s.storeLayer(ctx, layer)
}

// mkdir makes the layer of a directory.
func (s *stage) mkdir(ctx context.Context, op *dockerfile.Mkdir) (ocistore.CachedLayer, error) {
	below, err := s.files(ctx)
	if err != nil {
		return ocistore.CachedLayer{}, err
	}
	made, err := ownerOf(below, op.Owner)
	if err != nil {
		return ocistore.CachedLayer{}, err
	}
	layer := newLayerOver(below, made, s.fileTime())
	actual, _, _, err := layer.resolve(op.Path)
	if err == nil {
		err = layer.makeDirs(actual)
	}
	if err != nil {
		return ocistore.CachedLayer{}, err
	}
	return s.storeLayer(ctx, layer)
}

// storeLayer stores a layer that was made on the host.
func (s *stage) storeLayer(ctx context.Context, layer *newLayer) (ocistore.CachedLayer, error) {
	if len(layer.added) == 0 {
		return ocistore.CachedLayer{CreatedAt: s.now()}, nil
	}
	return s.store(ctx, layer.write)
}

// changeOf returns how files are changed, and who owns the directories that are made for them.
func (s *stage) changeOf(op *dockerfile.Copy, below files.Tree) (change, owner, error) {
	how := change{time: s.limitTime}
	if op.Owner != "" {
		found, err := ownerOf(below, op.Owner)
		if err != nil {
			return change{}, owner{}, fmt.Errorf("--chown: %w", err)
		}
		how.owner = &found
	}
	var err error
	how.mode, err = changeMode(op.Mode)
	if how.owner == nil {
		return how, owner{}, err
	}
	return how, *how.owner, err
}

// changeMode returns what --chmod does to modes; nil if it is not given.
func changeMode(text string) (func(uint32) uint32, error) {
	if text == "" {
		return nil, nil
	}
	if bits, err := strconv.ParseUint(text, 8, 32); err == nil {
		return func(old uint32) uint32 { return old&unix.S_IFMT | uint32(bits)&0o7777 }, nil
	}
	set, err := mode.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("--chmod=%s: %w", text, err)
	}
	return func(old uint32) uint32 { return old&unix.S_IFMT | bitsOf(set.Apply(fileMode(old))) }, nil
}

// specialBits are bits of a mode as the kernel and as package fs has them.
func specialBits() map[uint32]fs.FileMode {
	return map[uint32]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky}
}

func fileMode(old uint32) os.FileMode {
	made := fs.FileMode(old & 0o777)
	for bit, flag := range specialBits() {
		if old&bit != 0 {
			made |= flag
		}
	}
	if old&unix.S_IFMT == unix.S_IFDIR {
		made |= fs.ModeDir // which X is about
	}
	return made
}

func bitsOf(made fs.FileMode) uint32 {
	bits := uint32(made.Perm())
	for bit, flag := range specialBits() {
		if made&flag != 0 {
			bits |= bit
		}
	}
	return bits
}

// place puts all that is copied in its place. The caller closes the spools, which have what was
// unpacked.
func (s *stage) place(ctx context.Context, op *dockerfile.Copy, layer *newLayer, how change) ([]*files.Spool, error) {
	selected := s.selected // by the key, which needs its content
	if err := s.checkDest(op, layer, len(selected)+len(op.Files)); err != nil {
		return nil, err
	}
	var spools []*files.Spool
	for _, one := range selected {
		if op.Unpack && one.items[0].file.IsRegular() {
			spool, done, err := s.unpack(ctx, one.items[0], layer, op.Dest, change{owner: how.owner, time: how.time})
			if spool != nil {
				spools = append(spools, spool)
			}
			if err != nil {
				return spools, fmt.Errorf("unpack %q: %w", one.base, err)
			}
			if done {
				continue
			}
		}
		if err := layer.copySelection(one, op.Dest, how); err != nil {
			return spools, err
		}
	}
	for _, file := range op.Files {
		made := files.File{Mode: unix.S_IFREG | file.Mode, Size: int64(len(file.Content)), ModTime: s.fileTime()}
		one := selection{base: file.Name, items: []item{{file: made, open: inMemory([]byte(file.Content))}}}
		if err := layer.copySelection(one, op.Dest, how); err != nil {
			return spools, err
		}
	}
	return spools, nil
}

// checkDest checks that several files go to a directory.
func (s *stage) checkDest(op *dockerfile.Copy, layer *newLayer, count int) error {
	if count < 2 || strings.HasSuffix(op.Dest, "/") {
		return nil
	}
	_, there, exists, err := layer.resolve(op.Dest)
	if err != nil || exists && there.IsDir() {
		return err
	}
	return fmt.Errorf("%d files are copied to %q: a directory ends with a slash", count, op.Dest)
}

// unpack unpacks a file if it is an archive.
func (s *stage) unpack(ctx context.Context, file item, layer *newLayer, dest string, how change) (*files.Spool, bool, error) {
	isArchive, err := files.IsArchive(file.open)
	if err != nil || !isArchive {
		return nil, false, err
	}
	spool, err := files.NewSpool(s.opts.TempDir, 0)
	if err != nil {
		return nil, false, err
	}
	tree := ocilayer.NewTree(spool, ocilayer.Limits{Entries: maxEntries, Bytes: maxBytes})
	if err := tree.AddArchive(ctx, func() (io.ReadCloser, error) { return files.OpenArchive(file.open) }); err != nil {
		return spool, false, err
	}
	from := &selector{tree: files.Nodes{Root: tree.Root(), Spool: spool}, exclude: &files.Ignore{}}
	one, err := from.selectOne(ctx, "")
	if err != nil {
		return spool, false, err
	}
	actual, _, _, err := layer.resolve(dest)
	if err == nil {
		err = layer.copyDir(one.items, actual, how)
	}
	return spool, true, err
}
