// Package ocistore keeps OCI images: manifests, configurations and layers, by the digests of
// their content, and the names that point to them. They come from registries, from archives
// of `docker save`, from OCI layouts, and from the daemons of docker and podman.
//
// The store's directory:
//
//	blobs/sha256/<64 hex digits>    verified content
//	partial/<64 hex digits>         what there is of a blob so far; locked by who fetches it
//	names/<64 hex digits>           a name, by its hash, and the manifest that it means
//	spool/                          files of archives that are being imported
//	build/<64 hex digits>           the layer that a step of a build has led to, by its key
//	store.lock                      shared by who adds blobs, exclusive while they are removed
//
// A blob appears by a rename, so it is there either whole or not at all. All that is read
// from anywhere is hostile: it is bounded, and compared with its digest, before it is used.
package ocistore

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/step"
)

const (
	algorithm    = "sha256"
	digestPrefix = algorithm + ":"
	namesDir     = "names"
	partialDir   = "partial"
	spoolDir     = "spool"
)

// Limits bound what is taken in.
type Limits struct {
	// Image is the largest sum of an image's layers as they are stored, in bytes. Zero:
	// [DefaultMaxImage].
	Image int64
	// Room returns an error if there is no room for so many bytes more. Nil: there is.
	Room func(bytes int64) error
}

// DefaultMaxImage is the largest sum of an image's layers, in bytes, where nothing else is said.
const DefaultMaxImage = 64 << 30

// Bounds of what an image may consist of.
const (
	// maxDocument is the longest manifest, index or configuration, in bytes. Registries
	// take manifests of up to 4 MiB.
	maxDocument = 4 << 20
	// maxLayers is how many layers an image may have; docker's have at most 127.
	maxLayers = 512
	// maxIndexes is how deep indexes may lead to others.
	maxIndexes = 4
)

// Store keeps images below a directory. Any number of processes may use it.
type Store struct {
	dir    string
	limits Limits
}

// Open opens a store; its directory is made when the first image comes.
func Open(dir string, limits Limits) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open store of OCI images: %w", err)
	}
	limits.Image = cmp.Or(limits.Image, DefaultMaxImage)
	return &Store{dir: dir, limits: limits}, nil
}

// Image is an image of a store.
type Image struct {
	// Name is the whole name by which it was found; empty if it has none.
	Name string
	// Digest is the digest of its manifest, which says what it consists of.
	Digest string
	// Index is the digest of the index that led to the manifest: what a name pinned by a
	// digest usually has. Empty if there was none.
	Index string
	// Config is the digest of its configuration.
	Config string
	// Platform is what it is for, such as linux/amd64.
	Platform string
	// Layers are its layers, the lowest first.
	Layers []Layer
	// Size is the sum of its layers as they are stored, in bytes.
	Size int64
	// AddedAt is when the name began to mean it, and UsedAt when it was used last; see
	// [Store.Use].
	AddedAt, UsedAt time.Time
	// Pulled reports whether the name came from a registry, where it can be had again.
	Pulled bool
}

// Layer is a layer of an image.
type Layer struct {
	// Digest is the digest of what is stored, and DiffID that of the unpacked archive.
	Digest, DiffID string
	// MediaType is the type of what is stored, which tells how it is packed, if it is.
	MediaType string
	// Size is its size as it is stored, in bytes.
	Size int64
}

// nameRecord is what the file of a name holds.
type nameRecord struct {
	Name    string    `json:"name"`
	Digest  string    `json:"digest"`
	Index   string    `json:"index,omitempty"`
	AddedAt time.Time `json:"added_at"`
	Pulled  bool      `json:"pulled,omitempty"`

	// usedAt is when the file was changed last.
	usedAt time.Time
}

func (s *Store) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

// hexOf returns the hexadecimal digits of a digest, which are a safe name of a file.
func hexOf(digest string) (string, error) {
	hash, err := v1.NewHash(digest)
	if err != nil || hash.Algorithm != algorithm {
		return "", fmt.Errorf("digest %q: it is not sha256: and 64 hexadecimal digits", digest)
	}
	return hash.Hex, nil
}

// digestOf returns the digest of some content.
func digestOf(content []byte) string {
	sum := sha256.Sum256(content)
	return digestPrefix + hex.EncodeToString(sum[:])
}

func (s *Store) blobPath(hexDigits string) string { return s.path("blobs", algorithm, hexDigits) }

// has reports whether a blob of that size is there.
func (s *Store) has(hexDigits string, size int64) bool {
	info, err := os.Stat(s.blobPath(hexDigits))
	return err == nil && info.Mode().IsRegular() && info.Size() == size
}

// share holds the store's lock together with others, so that no blob is removed until it is
// released.
func (s *Store) share(ctx context.Context) (release func(), err error) {
	for _, dir := range []string{s.path("blobs", algorithm), s.path(partialDir), s.path(namesDir), s.path(spoolDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make store of OCI images: %w", err)
		}
	}
	file, err := s.openLock()
	if err != nil {
		return nil, err
	}
	if err := flock.LockShared(ctx, file); err != nil {
		return nil, fmt.Errorf("lock store of OCI images: %w", err)
	}
	return func() { _ = file.Close() }, nil
}

func (s *Store) openLock() (*os.File, error) {
	file, err := os.OpenFile(s.path("store.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock store of OCI images: %w", err)
	}
	return file, nil
}

// Get finds an image by its name, or by the digest that the name is pinned by, in the store
// only. The error matches [smolvm.ErrImageNotFound].
func (s *Store) Get(ref ociref.Ref) (Image, error) {
	record, err := s.readName(ref.String())
	if errors.Is(err, fs.ErrNotExist) {
		return Image{}, notFound(ref)
	}
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", ref, err)
	}
	return s.describe(record)
}

func notFound(ref ociref.Ref) error {
	return fmt.Errorf("image %s: %w", ref, smolvm.ErrImageNotFound)
}

func (s *Store) describe(record nameRecord) (Image, error) {
	text, err := s.readDocument(record.Digest)
	if err != nil {
		return Image{}, damaged(record, err)
	}
	image, _, err := s.parse(text)
	if err != nil {
		return Image{}, damaged(record, err)
	}
	config, err := s.readDocument(image.Config)
	if err != nil {
		return Image{}, damaged(record, err)
	}
	if err := image.configure(config); err != nil {
		return Image{}, damaged(record, err)
	}
	image.Name, image.Index, image.AddedAt = record.Name, record.Index, record.AddedAt
	image.UsedAt, image.Pulled = record.usedAt, record.Pulled
	return image, nil
}

func damaged(record nameRecord, err error) error {
	return &smolvm.Error{Err: fmt.Errorf("image %s: %w", record.Name, err), Hint: "pull it again"}
}

// parse reads a manifest. The second result is what it leads to, its configuration first.
func (s *Store) parse(text []byte) (Image, []v1.Descriptor, error) {
	manifest, err := v1.ParseManifest(bytes.NewReader(text))
	if err != nil {
		return Image{}, nil, fmt.Errorf("read manifest: %w", err)
	}
	if len(manifest.Layers) > maxLayers {
		return Image{}, nil, fmt.Errorf("the manifest has %d layers, more than %d", len(manifest.Layers), maxLayers)
	}
	if manifest.SchemaVersion != 2 {
		return Image{}, nil, fmt.Errorf("the manifest has version %d, and only 2 is known", manifest.SchemaVersion)
	}
	image := Image{Digest: digestOf(text), Config: manifest.Config.Digest.String()}
	if size := manifest.Config.Size; size <= 0 || size > maxDocument {
		return Image{}, nil, fmt.Errorf("a configuration of %d bytes is empty or too long", size)
	}
	parts := append([]v1.Descriptor{manifest.Config}, manifest.Layers...)
	for i, part := range parts {
		if _, err := hexOf(part.Digest.String()); err != nil {
			return Image{}, nil, fmt.Errorf("read manifest: %w", err)
		}
		if i == 0 {
			continue
		}
		if part.Size <= 0 || part.Size > s.limits.Image-image.Size {
			return Image{}, nil, fmt.Errorf("layer %d of %d bytes: an image may have %d bytes of layers, and none that is empty", i, part.Size, s.limits.Image)
		}
		if !part.MediaType.IsLayer() || !part.MediaType.IsDistributable() {
			return Image{}, nil, fmt.Errorf("layer %d has the type %q, which can't be unpacked", i, part.MediaType)
		}
		image.Size += part.Size
		image.Layers = append(image.Layers, Layer{Digest: part.Digest.String(), MediaType: string(part.MediaType), Size: part.Size})
	}
	return image, parts, nil
}

// configure takes from an image's configuration what it says of the layers.
func (i *Image) configure(text []byte) error {
	config, err := v1.ParseConfigFile(bytes.NewReader(text))
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	if len(config.RootFS.DiffIDs) != len(i.Layers) {
		return fmt.Errorf("the configuration has %d layers, and the manifest %d", len(config.RootFS.DiffIDs), len(i.Layers))
	}
	for n, id := range config.RootFS.DiffIDs {
		if _, err := hexOf(id.String()); err != nil {
			return fmt.Errorf("read configuration: %w", err)
		}
		i.Layers[n].DiffID = id.String()
	}
	i.Platform = v1.Platform{OS: config.OS, Architecture: config.Architecture, Variant: config.Variant}.String()
	return nil
}

// List returns the images that have names, by their names. Damaged ones have a name and a
// digest only.
func (s *Store) List() ([]Image, error) {
	records, err := s.names()
	if err != nil {
		return nil, err
	}
	images := []Image{}
	for _, record := range records {
		image, err := s.describe(record)
		if err != nil {
			image = Image{Name: record.Name, Digest: record.Digest, AddedAt: record.AddedAt}
		}
		images = append(images, image)
	}
	slices.SortFunc(images, func(a, b Image) int { return strings.Compare(a.Name, b.Name) })
	return images, nil
}

// Names returns the names of all images by the digests of their manifests, in order. It does not look
// into the images.
func (s *Store) Names() (map[string][]string, error) {
	records, err := s.names()
	if err != nil {
		return nil, err
	}
	names := map[string][]string{}
	for _, record := range records {
		names[record.Digest] = append(names[record.Digest], record.Name)
	}
	for _, of := range names {
		slices.Sort(of)
	}
	return names, nil
}

func (s *Store) names() ([]nameRecord, error) {
	entries, err := os.ReadDir(s.path(namesDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list OCI images: %w", err)
	}
	var records []nameRecord
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), ".") {
			continue // being written
		}
		record, err := s.readRecord(entry.Name())
		switch {
		case err == nil:
			records = append(records, record)
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("list OCI images: %w", err)
		}
	}
	return records, nil
}

// Use notes that an image is used now by its name.
func (s *Store) Use(image Image) error {
	now := time.Now()
	if err := os.Chtimes(s.path(namesDir, nameFile(image.Name)), now, now); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("note the use of image %s: %w", image.Name, err)
	}
	return nil
}

// Usage returns how many bytes all blobs take.
func (s *Store) Usage() (int64, error) {
	entries, err := os.ReadDir(s.path("blobs", algorithm))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("find out what OCI images take: %w", err)
	}
	var total int64
	for _, entry := range entries {
		if info, err := entry.Info(); err == nil {
			total += info.Size()
		}
	}
	return total, nil
}

// nameFile returns the name of the file of an image's name.
func nameFile(name string) string { return strings.TrimPrefix(digestOf([]byte(name)), digestPrefix) }

func (s *Store) readName(name string) (nameRecord, error) {
	record, err := s.readRecord(nameFile(name))
	if err == nil && record.Name != name {
		err = fmt.Errorf("the file of its name is of %q", record.Name)
	}
	return record, err
}

func (s *Store) readRecord(file string) (nameRecord, error) {
	var record nameRecord
	text, err := os.ReadFile(s.path(namesDir, file))
	if err != nil {
		return record, err
	}
	if info, err := os.Stat(s.path(namesDir, file)); err == nil {
		record.usedAt = info.ModTime()
	}
	if err := json.Unmarshal(text, &record); err != nil {
		return record, fmt.Errorf("%s: %w", file, err)
	}
	_, err = hexOf(record.Digest)
	return record, err
}

// writeName has a name mean an image.
func (s *Store) writeName(ctx context.Context, record nameRecord) error {
	text, err := json.MarshalIndent(record, "", "\t")
	if err != nil {
		return err
	}
	if err := s.writeFile(s.path(namesDir), nameFile(record.Name), text); err != nil {
		return fmt.Errorf("name image %s: %w", record.Name, err)
	}
	step.Reached(ctx, "image pull/named")
	return nil
}

// writeFile makes a file appear whole.
func (s *Store) writeFile(dir, name string, content []byte) error {
	temp, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	_, err = temp.Write(content)
	err = errors.Join(err, temp.Sync(), temp.Close())
	if err == nil {
		err = os.Rename(temp.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp.Name()))
	}
	return durable.Sync(dir)
}

// putDocument stores a document.
func (s *Store) putDocument(content []byte) error {
	digest := digestOf(content)
	if _, err := s.readDocument(digest); err == nil {
		return nil
	}
	return s.writeFile(s.path("blobs", algorithm), strings.TrimPrefix(digest, digestPrefix), content)
}

// readDocument reads a document, and checks that it is the one.
func (s *Store) readDocument(digest string) ([]byte, error) {
	digits, err := hexOf(digest)
	if err != nil {
		return nil, err
	}
	file, err := os.Open(s.blobPath(digits))
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	return readDocument(file, digest)
}

// readDocument reads a document from anywhere, and checks that it is the one, unless the
// digest is empty.
func readDocument(r io.Reader, digest string) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxDocument {
		return nil, fmt.Errorf("a document has more than %d MiB", maxDocument>>20)
	}
	if got := digestOf(text); digest != "" && got != digest {
		return nil, &DigestError{Want: digest, Got: got}
	}
	return text, nil
}

// DigestError reports content that is not what its digest says.
type DigestError struct{ Want, Got string }

func (e *DigestError) Error() string {
	return fmt.Sprintf("the content's digest is %s, and not %s", e.Got, e.Want)
}

// Document returns a manifest or a configuration of an image, checked.
func (s *Store) Document(digest string) ([]byte, error) {
	text, err := s.readDocument(digest)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", digest, err)
	}
	return text, nil
}

// OpenLayer opens a layer as it is stored. Its content was checked when it came.
func (s *Store) OpenLayer(layer Layer) (*os.File, error) {
	digits, err := hexOf(layer.Digest)
	if err != nil {
		return nil, err
	}
	file, err := os.Open(s.blobPath(digits))
	if err != nil {
		return nil, fmt.Errorf("open layer: %w", err)
	}
	return file, nil
}

// Discard removes a blob that was found to be damaged, so that the next pull fetches it again.
func (s *Store) Discard(digest string) error {
	digits, err := hexOf(digest)
	if err != nil {
		return err
	}
	if err := os.Remove(s.blobPath(digits)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove damaged blob: %w", err)
	}
	return nil
}

// Hold keeps all blobs from being removed until release is called, or this process ends: for
// who reads an image's layers.
func (s *Store) Hold(ctx context.Context) (release func(), err error) { return s.share(ctx) }
