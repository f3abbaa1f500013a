package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/step"
)

// layeredDir holds, by the digest of an OCI image's manifest, which image was made of it.
const layeredDir = "layered"

// layeredVersion changes whenever the same layers make another root file system.
const layeredVersion = 2

// Layered says how to make an image of the layers of an OCI image.
type Layered struct {
	// OCI is the OCI image: what is made of it is found by its digest.
	OCI smolvm.OCIImage
	// Config is what it says of its program.
	Config smolvm.ImageConfig
	// Layers are its layers, the lowest first, and Sizes how many bytes each has as it is
	// stored.
	Layers []ocilayer.Layer
	Sizes  []int64
	// Base is the digest of the image whose kernel, initramfs and kernel arguments it has.
	Base string
	// Limits bound what the layers may make.
	Limits ocilayer.Limits
	// Progress is told how far it is; it may be nil.
	Progress func(smolvm.Progress)
}

// key names all that the image is made of.
func (l Layered) key() string {
	return hashOf(fmt.Appendf(nil, "layered %d %s\n%s\n%s\n", layeredVersion, runtime.GOARCH, l.Base, l.OCI.Digest))
}

// layeredRecord is what a file in layeredDir holds.
type layeredRecord struct {
	Digest string `json:"digest"`
	// Recipe is the key of the [Layered] by which the image was made.
	Recipe string `json:"recipe"`
}

// EnsureLayered returns the image of an OCI image, and makes it unless it is there. Of several
// processes that make the same image at once, one does the work. Kernel and initramfs, and the
// root file system if an image of other ones has it, are shared with the images that have them
// already.
func (s *Store) EnsureLayered(ctx context.Context, l Layered) (smolvm.Image, error) {
	if found, ok := s.currentLayered(l); ok {
		return found, nil
	}
	return s.buildOnce(ctx, func() (smolvm.Image, bool) { return s.currentLayered(l) },
		func(work string) (string, error) { return s.buildLayered(ctx, l, work) })
}

// FindLayered finds the image that was made of an OCI image last, whatever it was made with.
// The error matches [smolvm.ErrImageNotFound].
func (s *Store) FindLayered(oci string) (smolvm.Image, error) {
	record, err := s.readLayered(oci)
	if errors.Is(err, fs.ErrNotExist) {
		return smolvm.Image{}, notFound(oci)
	}
	if err != nil {
		return smolvm.Image{}, err
	}
	return s.describe(record.Digest)
}

func (s *Store) currentLayered(l Layered) (smolvm.Image, bool) {
	record, err := s.readLayered(l.OCI.Digest)
	if err != nil || record.Recipe != l.key() {
		return smolvm.Image{}, false
	}
	found, err := s.describe(record.Digest)
	return found, err == nil
}

func (s *Store) layeredPath(oci string) (string, error) {
	digits := strings.TrimPrefix(oci, digestPrefix)
	if !isDigest(digits) {
		return "", fmt.Errorf("digest %q of an OCI image: it is not sha256: and 64 hexadecimal digits", oci)
	}
	return filepath.Join(s.dir, layeredDir, digits), nil
}

func (s *Store) readLayered(oci string) (layeredRecord, error) {
	var record layeredRecord
	path, err := s.layeredPath(oci)
	if err != nil {
		return record, err
	}
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &record)
	}
	if err == nil && !isDigest(strings.TrimPrefix(record.Digest, digestPrefix)) {
		err = fmt.Errorf("the image of OCI image %s is said to be %q", oci, record.Digest)
	}
	return record, err
}

// forgetLayered removes what says that an image was made of an OCI image.
func (s *Store) forgetLayered(digest string) error {
	// What can't be read leads to nothing, and is written anew.
	meta, err := s.readMetadata(digest)
	if err == nil && meta.OCI != nil {
		record, err := s.readLayered(meta.OCI.Digest)
		if err == nil && record.Digest == digest {
			path, err := s.layeredPath(meta.OCI.Digest)
			if err != nil {
				return err
			}
			return os.Remove(path)
		}
	}
	return nil
}

// buildLayered makes an image below work, and has it appear. The store's lock is held.
func (s *Store) buildLayered(ctx context.Context, l Layered, work string) (string, error) {
	release, err := s.Hold(l.Base)
	if err != nil {
		return "", fmt.Errorf("the image that has the kernel: %w", err)
	}
	defer release()
	base, err := s.load(l.Base)
	if err != nil {
		return "", fmt.Errorf("the image that has the kernel: %w", err)
	}
	out := filepath.Join(work, "image")
	if err := os.Mkdir(out, 0o700); err != nil {
		return "", err
	}
	for name, from := range map[string]string{kernelFile: base.KernelPath, initramfsFile: base.InitrdPath} {
		if err := share(ctx, from, filepath.Join(out, name)); err != nil {
			return "", fmt.Errorf("share %s: %w", name, err)
		}
	}
	if err := s.layeredRootfs(ctx, l, filepath.Join(out, rootfsFile)); err != nil {
		return "", err
	}
	meta := metadata{
		Digest:        digestPrefix + hashOf([]byte(l.key()+base.BootArgs)),
		BootArgs:      base.BootArgs,
		Arch:          base.Arch,
		Source:        sourceOf(l.OCI),
		OCI:           &l.OCI,
		Config:        &l.Config,
		RootfsVersion: layeredVersion,
		CreatedAt:     time.Now().UTC(),
	}
	if err := s.appear(ctx, work, out, meta); err != nil {
		return "", fmt.Errorf("publish image: %w", err)
	}
	path, err := s.layeredPath(l.OCI.Digest)
	if err != nil {
		return "", err
	}
	if err := s.writeRecord(path, layeredRecord{Digest: meta.Digest, Recipe: l.key()}); err != nil {
		return "", fmt.Errorf("publish image: %w", err)
	}
	step.Reached(ctx, "image build/named")
	return meta.Digest, nil
}

// sourceOf tells in words what an OCI image is.
func sourceOf(oci smolvm.OCIImage) string {
	if oci.Reference == "" {
		return "OCI image " + oci.Digest
	}
	if ref, err := ociref.Parse(oci.Reference); err == nil && ref.IsBuiltin() {
		return "packages of the distribution"
	}
	return oci.Reference
}

// layeredRootfs makes the root file system, or shares that of an image of the same layers, such
// as one with another agent.
func (s *Store) layeredRootfs(ctx context.Context, l Layered, path string) error {
	if record, err := s.readLayered(l.OCI.Digest); err == nil {
		if release, err := s.Hold(record.Digest); err == nil {
			defer release()
			if meta, err := s.readMetadata(record.Digest); err == nil && meta.RootfsVersion == layeredVersion {
				if share(ctx, filepath.Join(s.imageDir(record.Digest), rootfsFile), path) == nil {
					return nil
				}
				_ = os.Remove(path) // a copy that was cut off
			}
		}
	}
	return WriteLayers(ctx, path, l.Layers, LayerOptions{Limits: l.Limits, Progress: l.report()})
}

// report returns what the unpacking of the layers reports to; nil for nobody.
func (l Layered) report() ocilayer.Progress {
	if l.Progress == nil {
		return nil
	}
	var total int64
	before := make([]int64, len(l.Sizes))
	for i, size := range l.Sizes {
		before[i] = total
		total += size
	}
	return func(layer int, bytes int64) {
		l.Progress(smolvm.Progress{Phase: "unpack layers", Done: before[layer] + bytes, Total: total})
	}
}

// share makes a file that never changes a file of another name too: a hard link, or where there
// are none a copy, which shares its blocks if the file system can.
func share(ctx context.Context, from, to string) error {
	if err := os.Link(from, to); err == nil {
		return nil
	}
	return disk.Copy(ctx, disk.CopyOptions{Path: to, Base: from})
}
