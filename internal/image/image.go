// Package image builds images and keeps them by digest. An image is a kernel, an
// initramfs with the agent, a root file system and default kernel arguments; once
// built it never changes.
//
// The store's directory:
//
//	<64 hex digits>/     an image: image.json, vmlinux, initramfs, rootfs
//	names/<name>         which image a name means, and by which recipe
//	layered/<64 digits>  which image was made of the OCI image of that digest
//	kernels/             users' own kernels, unpacked
//	build.lock           held while an image is built
//	.build-*             a build under way, or what a killed one has left
//
// An image appears by a rename, so it is there either whole or not at all.
package image

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/step"
)

const (
	digestPrefix = "sha256:"
	namesDir     = "names"
	kernelsDir   = "kernels"
	metadataFile = "image.json"
	buildPrefix  = ".build-"
)

// MinAbbreviation is the shortest beginning of a digest that stands for it, in hexadecimal digits.
const MinAbbreviation = 8

// isName reports whether an image may have a name.
func isName(name string) bool {
	return name != "" && len(name) <= maxName && isAlphanumeric(rune(name[0])) &&
		!strings.ContainsFunc(name, func(r rune) bool { return !isAlphanumeric(r) && !strings.ContainsRune("._-", r) })
}

// maxName is the longest name of an image, in bytes.
const maxName = 64

func isAlphanumeric(r rune) bool { return 'a' <= r && r <= 'z' || '0' <= r && r <= '9' }

// isDigest reports whether a name is 64 hexadecimal digits.
func isDigest(name string) bool {
	return len(name) == 64 && !strings.ContainsFunc(name, func(r rune) bool { return !strings.ContainsRune("0123456789abcdef", r) })
}

// imageFiles returns the files of an image beside its metadata.
func imageFiles() []string { return []string{kernelFile, initramfsFile, rootfsFile} }

// Store keeps images below a directory. Any number of processes may use it.
type Store struct{ dir string }

// Open opens a store; its directory is made when the first image is.
func Open(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	return &Store{dir: dir}, nil
}

// metadata is the image.json of an image, and all that is read to find one.
type metadata struct {
	Digest    string    `json:"digest"`
	BootArgs  string    `json:"boot_args"`
	Arch      string    `json:"arch"`
	Source    string    `json:"source"`
	CreatedAt time.Time `json:"created_at"`
	// OCI and Config are those of an image that was made of layers, as in [smolvm.Image], and
	// RootfsVersion is the layeredVersion by which they were unpacked.
	OCI           *smolvm.OCIImage    `json:"oci,omitempty"`
	Config        *smolvm.ImageConfig `json:"config,omitempty"`
	RootfsVersion int                 `json:"rootfs_version,omitempty"`
}

// nameRecord is what a file in names holds.
type nameRecord struct {
	Digest string `json:"digest"`
	// Recipe is the key of the recipe by which the image was built.
	Recipe string `json:"recipe"`
	// Agent is the program that is in it, so that it need not be read again to
	// find out that it is the same.
	Agent fileID `json:"agent"`
	// AgentHash is the hash of that program.
	AgentHash string `json:"agent_hash"`
}

// Get finds an image by name, digest, or the beginning of its digest.
func (s *Store) Get(ctx context.Context, ref string) (smolvm.Image, error) {
	digest, err := s.resolve(ctx, ref)
	if err != nil {
		return smolvm.Image{}, err
	}
	return s.describe(digest)
}

// resolve finds the digest that is meant; its image may be damaged.
func (s *Store) resolve(ctx context.Context, ref string) (string, error) {
	if record, err := s.readName(ref); err == nil {
		return record.Digest, nil
	}
	digests, err := s.digests(ctx)
	if err != nil {
		return "", err
	}
	beginning := strings.TrimPrefix(ref, digestPrefix)
	if len(beginning) < MinAbbreviation {
		return "", notFound(ref)
	}
	digests = slices.DeleteFunc(digests, func(digest string) bool {
		return !strings.HasPrefix(digest, digestPrefix+beginning)
	})
	switch len(digests) {
	case 0:
		return "", notFound(ref)
	case 1:
		return digests[0], nil
	}
	return "", fmt.Errorf("image %q: %d digests begin so; give more of it", ref, len(digests))
}

// digests lists all images, damaged ones too.
func (s *Store) digests(ctx context.Context) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var digests []string
	for _, entry := range entries {
		if isDigest(entry.Name()) {
			digests = append(digests, digestPrefix+entry.Name())
		}
	}
	return digests, nil
}

func notFound(ref string) error {
	return &smolvm.Error{Hint: "`smolvm image ls` lists the images, `smolvm image build` builds the default one",
		Err: fmt.Errorf("%q: %w", ref, smolvm.ErrImageNotFound)}
}

func (s *Store) imageDir(digest string) string {
	return filepath.Join(s.dir, strings.TrimPrefix(digest, digestPrefix))
}

// describe reads an image and the names that point to it.
func (s *Store) describe(digest string) (smolvm.Image, error) {
	image, err := s.load(digest)
	if err != nil {
		return smolvm.Image{}, err
	}
	names, err := s.names()
	if err != nil {
		return smolvm.Image{}, err
	}
	image.Names = append(image.Names, names[digest]...)
	image.Size = usage(s.imageDir(digest))
	return image, nil
}

// load reads an image without the names that point to it.
func (s *Store) load(digest string) (smolvm.Image, error) {
	dir := s.imageDir(digest)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return smolvm.Image{}, notFound(digest)
	}
	meta, err := s.readMetadata(digest)
	for _, name := range imageFiles() {
		if err == nil {
			_, err = os.Stat(filepath.Join(dir, name))
		}
	}
	if err != nil {
		return smolvm.Image{}, fmt.Errorf("image %s is damaged (%w): build it again, or delete %s", digest, err, dir)
	}
	small := filepath.Join(dir, smallFile)
	if _, err := os.Stat(small); err != nil {
		small = ""
	}
	return smolvm.Image{
		Digest:          digest,
		Names:           []string{},
		KernelPath:      filepath.Join(dir, kernelFile),
		InitrdPath:      filepath.Join(dir, initramfsFile),
		RootfsPath:      filepath.Join(dir, rootfsFile),
		SmallRootfsPath: small,
		BootArgs:        meta.BootArgs,
		Arch:            meta.Arch,
		Source:          meta.Source,
		OCI:             meta.OCI,
		Config:          meta.Config,
		CreatedAt:       meta.CreatedAt,
	}, nil
}

func (s *Store) readMetadata(digest string) (metadata, error) {
	var meta metadata
	text, err := os.ReadFile(filepath.Join(s.imageDir(digest), metadataFile))
	if err == nil {
		err = json.Unmarshal(text, &meta)
	}
	if err == nil && meta.Digest != digest {
		err = fmt.Errorf("%s is of %q", metadataFile, meta.Digest)
	}
	return meta, err
}

// List returns all images, the oldest first, with their names and sizes.
func (s *Store) List(ctx context.Context) ([]smolvm.Image, error) {
	digests, err := s.digests(ctx)
	if err != nil {
		return nil, err
	}
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	images := []smolvm.Image{}
	for _, digest := range digests {
		image, err := s.load(digest)
		switch {
		case errors.Is(err, smolvm.ErrImageNotFound):
			continue // removed in between
		case err != nil:
			// A damaged image does not hide the others.
			image = smolvm.Image{Digest: digest, Names: []string{}, Source: err.Error()}
		}
		image.Names = append(image.Names, names[digest]...)
		image.Size = usage(s.imageDir(digest))
		images = append(images, image)
	}
	slices.SortFunc(images, func(a, b smolvm.Image) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.Digest, b.Digest))
	})
	return images, nil
}

// names returns the names of each digest, in order.
func (s *Store) names() (map[string][]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, namesDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list images: %w", err)
	}
	names := map[string][]string{}
	for _, entry := range entries {
		if record, err := s.readName(entry.Name()); err == nil {
			names[record.Digest] = append(names[record.Digest], entry.Name())
		}
	}
	return names, nil
}

func (s *Store) readName(name string) (nameRecord, error) {
	var record nameRecord
	if !isName(name) {
		return record, fs.ErrNotExist
	}
	text, err := os.ReadFile(filepath.Join(s.dir, namesDir, name))
	if err == nil {
		err = json.Unmarshal(text, &record)
	}
	if err == nil && !isDigest(strings.TrimPrefix(record.Digest, digestPrefix)) {
		err = fmt.Errorf("name %q of an image points to %q", name, record.Digest)
	}
	return record, err
}

func (s *Store) writeName(name string, record nameRecord) error {
	return s.writeRecord(filepath.Join(s.dir, namesDir, name), record)
}

// writeRecord makes a small file appear whole. Only one process at a time does that: it holds
// the store's lock.
func (s *Store) writeRecord(path string, record any) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	temp := filepath.Join(dir, ".new")
	if err := writeJSON(temp, record); err != nil {
		return err
	}
	if err := durable.Sync(temp); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

func writeJSON(path string, value any) error {
	text, err := json.MarshalIndent(value, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o600)
}

// usage returns the space that the files in a directory take, in bytes.
func usage(dir string) int64 {
	var total int64
	_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var stat unix.Stat_t
		if err == nil && unix.Lstat(path, &stat) == nil {
			total += stat.Blocks * 512
		}
		return nil
	})
	return total
}

// Remove removes an image and the names that point to it, unless check returns an error:
// while it is called, nobody begins to use the image. The error matches
// [smolvm.ErrImageInUse] if somebody has just begun; see [Store.Hold].
func (s *Store) Remove(ctx context.Context, ref string, check func() error) error {
	digest, err := s.resolve(ctx, ref)
	if err != nil {
		return err
	}
	unlock, err := s.lockBuilds(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.removeUnused(ctx, digest, check)
}

func (s *Store) removeUnused(ctx context.Context, digest string, check func() error) error {
	release, err := s.seize(digest)
	if err != nil {
		return err
	}
	defer release()
	if err := check(); err != nil {
		return err
	}
	return s.remove(ctx, digest)
}

func (s *Store) remove(ctx context.Context, digest string) error {
	names, err := s.names()
	if err != nil {
		return err
	}
	for _, name := range names[digest] {
		if err := os.Remove(filepath.Join(s.dir, namesDir, name)); err != nil {
			return fmt.Errorf("remove image %s: %w", digest, err)
		}
		step.Reached(ctx, "image rm/unnamed")
	}
	if err := s.forgetLayered(digest); err != nil {
		return fmt.Errorf("remove image %s: %w", digest, err)
	}
	// By a rename first, so that no half image is found.
	dir := s.imageDir(digest)
	gone := filepath.Join(s.dir, buildPrefix+"removed-"+filepath.Base(dir))
	if err := os.RemoveAll(gone); err != nil { // left by a removal that was killed
		return fmt.Errorf("remove image %s: %w", digest, err)
	}
	if err := os.Rename(dir, gone); errors.Is(err, fs.ErrNotExist) {
		return notFound(digest)
	} else if err != nil {
		return fmt.Errorf("remove image %s: %w", digest, err)
	}
	step.Reached(ctx, "image rm/moved away")
	return os.RemoveAll(gone)
}

// errKept reports that an image is not to be removed.
var errKept = errors.New("image is kept")

// Prune removes every image that keep does not want, what killed builds have left,
// and users' unpacked kernels, which are unpacked again when they are needed. While keep
// is called, nobody begins to use the image.
func (s *Store) Prune(ctx context.Context, keep func(smolvm.Image) (bool, error)) ([]smolvm.Image, error) {
	removed := []smolvm.Image{}
	if _, err := os.Stat(s.dir); errors.Is(err, fs.ErrNotExist) {
		return removed, nil
	}
	unlock, err := s.lockBuilds(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	images, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, image := range images {
		err := s.removeUnused(ctx, image.Digest, func() error {
			kept, err := keep(image)
			if kept && err == nil {
				err = errKept
			}
			return err
		})
		switch {
		case err == nil:
			removed = append(removed, image)
		case !errors.Is(err, errKept) && !errors.Is(err, smolvm.ErrImageInUse):
			return removed, err
		}
	}
	return removed, errors.Join(s.removeLeftovers(), os.RemoveAll(filepath.Join(s.dir, kernelsDir)))
}

// removeLeftovers removes what killed builds have left. It is called with the lock
// held, so no build is under way.
func (s *Store) removeLeftovers() error {
	left, err := glob.In(s.dir, buildPrefix+"*")
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range left {
		errs = append(errs, os.RemoveAll(path))
	}
	return errors.Join(errs...)
}

func (s *Store) lockPath() string { return filepath.Join(s.dir, "build.lock") }

func (s *Store) openLock() (*os.File, error) {
	return os.OpenFile(s.lockPath(), os.O_CREATE|os.O_RDWR, 0o600)
}

// lockBuilds waits for the store's lock, which the kernel frees when its holder dies.
func (s *Store) lockBuilds(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("lock image store: %w", err)
	}
	if unlock, err = flock.At(ctx, s.lockPath()); err != nil {
		return nil, fmt.Errorf("wait for another build: %w", err)
	}
	return unlock, nil
}
