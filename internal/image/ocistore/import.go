package ocistore

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/image/decompress"
	"github.com/smolvm/smolvm/internal/image/ociref"
)

// ImportOptions are the options of [Store.Import] and [Store.ImportDir].
type ImportOptions struct {
	// Name is the name that the image gets. The zero value: those that the archive has.
	Name ociref.Ref
	// Platform is what the image is to be for, such as linux/arm64. Empty: this host's guests.
	Platform string
	// Progress is told how far each layer is; it may be nil.
	Progress func(Progress)
}

// Bounds of an archive.
const (
	// maxArchiveFiles is how many files an archive may have, and maxImages how many images.
	maxArchiveFiles, maxImages = 8192, 256
	// maxFileName is the longest name of a file in an archive, in bytes.
	maxFileName = 512
	// maxChain is how many symbolic links may lead from one to the next: old archives of
	// docker have one where two images share a layer.
	maxChain = 4
)

// Import stores the images of an archive: one of `docker save` or `podman save`, or an OCI
// layout as tar, packed by gzip or not. It is read once, from its beginning to its end.
func (s *Store) Import(ctx context.Context, r io.Reader, opts ImportOptions) ([]Image, error) {
	images, err := s.importArchive(ctx, r, opts)
	if err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	return images, nil
}

func (s *Store) importArchive(ctx context.Context, r io.Reader, opts ImportOptions) ([]Image, error) {
	want, err := newRequest(opts.Platform, opts.Progress)
	if err != nil {
		return nil, err
	}
	release, err := s.share(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	dir, err := os.MkdirTemp(s.path(spoolDir), "import-*")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	files := &spool{dir: dir, files: map[string]spooled{}, links: map[string]string{}, byDigest: map[string]spooled{}, left: 2 * s.limits.Image}
	if err := files.fill(ctx, r, s.limits.Room); err != nil {
		return nil, err
	}
	if _, ok := files.find("index.json"); ok {
		return s.importLayout(ctx, files, opts, want)
	}
	return s.importDocker(ctx, files, opts, want)
}

// spool holds the files of an archive.
type spool struct {
	dir      string
	files    map[string]spooled // by their names in the archive
	links    map[string]string  // symbolic and hard ones, to such names
	byDigest map[string]spooled
	left     int64 // how many bytes it may still take
	count    int   // of files that it has taken
}

// spooled is a file of an archive.
type spooled struct {
	path, digest string
	size         int64
}

// errNoArchive reports that what is imported is no archive.
var errNoArchive = errors.New("this is no archive of an image: neither of `docker save` nor an OCI layout")

// fill reads an archive.
func (f *spool) fill(ctx context.Context, r io.Reader, room func(int64) error) error {
	unpacked, err := decompress.Detect(bufio.NewReaderSize(r, 256<<10), decompress.Gzip)
	if err != nil {
		return err
	}
	defer func() { _ = unpacked.Close() }()
	archive := tar.NewReader(contextReader{ctx, unpacked})
	for count := 0; ; count++ {
		header, err := archive.Next()
		switch {
		case errors.Is(err, io.EOF) && count > 0:
			return nil
		case err != nil && (count == 0 || errors.Is(err, tar.ErrHeader)) && ctx.Err() == nil:
			return fmt.Errorf("%w: %w", errNoArchive, err)
		case err != nil:
			return err
		case count >= maxArchiveFiles:
			return fmt.Errorf("the archive has more than %d files", maxArchiveFiles)
		}
		if err := f.take(header, archive, room); err != nil {
			return err
		}
	}
}

func (f *spool) take(header *tar.Header, content io.Reader, room func(int64) error) error {
	name := cleanName(header.Name)
	if len(name) > maxFileName {
		return fmt.Errorf("a file's name in the archive has %d bytes, more than %d", len(name), maxFileName)
	}
	switch header.Typeflag {
	case tar.TypeReg:
	case tar.TypeSymlink:
		f.links[name] = cleanName(path.Join(path.Dir(name), header.Linkname))
		return nil
	case tar.TypeLink:
		f.links[name] = cleanName(header.Linkname)
		return nil
	default:
		return nil // directories say nothing that is needed
	}
	if header.Size < 0 || header.Size > f.left {
		return fmt.Errorf("%q in the archive: there are more bytes than an image may have", name)
	}
	if room != nil && header.Size > maxDocument {
		if err := room(header.Size); err != nil {
			return err
		}
	}
	f.left -= header.Size
	return f.store(name, content)
}

func (f *spool) store(name string, content io.Reader) error {
	file, err := os.OpenFile(filepath.Join(f.dir, fmt.Sprint(f.count)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	hash := sha256.New()
	size, err := io.Copy(io.MultiWriter(file, hash), content)
	if err := errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("%q in the archive: %w", name, err)
	}
	f.count++
	taken := spooled{path: file.Name(), digest: digestPrefix + hex.EncodeToString(hash.Sum(nil)), size: size}
	f.files[name], f.byDigest[taken.digest] = taken, taken // of two with one name the last, as tar has it
	return nil
}

// cleanName makes a name one that leads from the top of the archive to within it.
func cleanName(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// find finds a file of the archive.
func (f *spool) find(name string) (spooled, bool) {
	name = cleanName(name)
	for range maxChain {
		if file, ok := f.files[name]; ok {
			return file, true
		}
		next, ok := f.links[name]
		if !ok {
			return spooled{}, false
		}
		name = next
	}
	return spooled{}, false
}

// document reads a small file of the archive.
func (f *spool) document(name string) ([]byte, error) {
	file, ok := f.find(name)
	if !ok {
		return nil, fmt.Errorf("%q is not in the archive", name)
	}
	opened, err := os.Open(file.path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = opened.Close() }()
	return readDocument(opened, file.digest)
}

// manifest returns a document by its digest: the files of an OCI layout are named by them, but
// that is not relied on.
func (f *spool) manifest(_ context.Context, digest string) ([]byte, error) {
	file, ok := f.byDigest[digest]
	if !ok {
		return nil, fmt.Errorf("%s is not in the archive", digest)
	}
	opened, err := os.Open(file.path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = opened.Close() }()
	return readDocument(opened, digest)
}

// blob gives a file of the archive to the store.
func (f *spool) blob(ctx context.Context, s *Store, want v1.Descriptor, report func(done int64)) error {
	if s.has(want.Digest.Hex, want.Size) {
		return nil
	}
	file, ok := f.byDigest[want.Digest.String()]
	if !ok {
		return fmt.Errorf("%s is not in the archive", want.Digest)
	}
	if file.size != want.Size {
		return fmt.Errorf("%s has %d bytes in the archive, and %d in the manifest", want.Digest, file.size, want.Size)
	}
	// Several images of the archive may have it: the first takes the file away.
	err := durable.Sync(file.path)
	if err == nil {
		err = os.Rename(file.path, s.blobPath(want.Digest.Hex))
	}
	if err != nil && s.has(want.Digest.Hex, want.Size) {
		err = nil
	}
	if err != nil || ctx.Err() != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	report(want.Size)
	return durable.Sync(s.path("blobs", algorithm))
}

// dockerImage is an image in the manifest.json of an archive of docker.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// importDocker stores the images of an archive of docker, for which a manifest is made.
func (s *Store) importDocker(ctx context.Context, files *spool, opts ImportOptions, want request) ([]Image, error) {
	text, err := files.document("manifest.json")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoArchive, err)
	}
	var list []dockerImage
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("read manifest.json: %w", err)
	}
	if err := checkCount(len(list), opts); err != nil {
		return nil, err
	}
	var images []Image
	for _, entry := range list {
		manifest, err := files.manifestOf(entry)
		if err != nil {
			return nil, err
		}
		image, err := s.add(ctx, files, manifest, want)
		if err != nil {
			return nil, err
		}
		named, err := s.nameAll(ctx, image, entry.RepoTags, opts)
		if err != nil {
			return nil, err
		}
		images = append(images, named...)
	}
	return images, nil
}

// checkCount checks how many images an archive has.
func checkCount(count int, opts ImportOptions) error {
	switch {
	case count == 0:
		return errors.New("the archive has no image")
	case count > maxImages:
		return fmt.Errorf("the archive has %d images, more than %d", count, maxImages)
	case count > 1 && opts.Name != (ociref.Ref{}):
		return &smolvm.Error{Err: fmt.Errorf("the archive has %d images, and can't give all of them the name %s", count, opts.Name), Hint: "import it without a name"}
	}
	return nil
}

// manifestOf makes a manifest of an image of docker's.
func (f *spool) manifestOf(entry dockerImage) ([]byte, error) {
	config, ok := f.find(entry.Config)
	if !ok {
		return nil, fmt.Errorf("the configuration %q is not in the archive", entry.Config)
	}
	manifest := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	var err error
	if manifest.Config, err = config.descriptor(types.OCIConfigJSON); err != nil {
		return nil, err
	}
	for _, name := range entry.Layers {
		layer, ok := f.find(name)
		if !ok {
			return nil, fmt.Errorf("the layer %q is not in the archive", name)
		}
		// How it is packed is found out when it is unpacked; docker packs none.
		described, err := layer.descriptor(types.OCIUncompressedLayer)
		if err != nil {
			return nil, err
		}
		manifest.Layers = append(manifest.Layers, described)
	}
	return json.Marshal(manifest)
}

func (f spooled) descriptor(kind types.MediaType) (v1.Descriptor, error) {
	hash, err := v1.NewHash(f.digest)
	return v1.Descriptor{MediaType: kind, Size: f.size, Digest: hash}, err
}

// nameAll gives an image its names.
func (s *Store) nameAll(ctx context.Context, image Image, names []string, opts ImportOptions) ([]Image, error) {
	refs := []ociref.Ref{opts.Name}
	if opts.Name == (ociref.Ref{}) {
		refs = nil
		for _, name := range names {
			ref, err := ociref.Parse(name)
			if err != nil {
				return nil, err
			}
			refs = append(refs, ref)
		}
	}
	if len(refs) == 0 {
		return nil, &smolvm.Error{Err: fmt.Errorf("image %s has no name in the archive", image.Digest), Hint: "give it one"}
	}
	if len(refs) > maxImages {
		return nil, fmt.Errorf("image %s has %d names, more than %d", image.Digest, len(refs), maxImages)
	}
	var images []Image
	for _, ref := range refs {
		image.Name = ref.String()
		if err := s.name(ctx, image); err != nil {
			return nil, err
		}
		image.Layers = slices.Clone(image.Layers)
		images = append(images, image)
	}
	return images, nil
}
