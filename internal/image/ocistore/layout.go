package ocistore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// Annotations by which an OCI layout names its images: those of containerd and docker are
// whole names, the specification's often is the tag only.
const (
	nameAnnotation = "io.containerd.image.name"
	tagAnnotation  = "org.opencontainers.image.ref.name"
)

// layoutSource is where an OCI layout is.
type layoutSource interface {
	source
	document(name string) ([]byte, error)
}

// ImportDir stores the images of an OCI layout, which is a directory. No link in it is followed.
func (s *Store) ImportDir(ctx context.Context, dir string, opts ImportOptions) ([]Image, error) {
	images, err := s.importDir(ctx, dir, opts)
	if err != nil {
		return nil, fmt.Errorf("import image from %s: %w", dir, err)
	}
	return images, nil
}

func (s *Store) importDir(ctx context.Context, dir string, opts ImportOptions) ([]Image, error) {
	want, err := newRequest(opts.Platform, opts.Progress)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	release, err := s.share(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return s.importLayout(ctx, layoutDir{root}, opts, want)
}

// importLayout stores the images that the index of a layout leads to.
func (s *Store) importLayout(ctx context.Context, from layoutSource, opts ImportOptions, want request) ([]Image, error) {
	marker, err := from.document("oci-layout")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoArchive, err)
	}
	var layout struct {
		Version string `json:"imageLayoutVersion"`
	}
	if err := json.Unmarshal(marker, &layout); err != nil || layout.Version != "1.0.0" {
		return nil, fmt.Errorf("the OCI layout has the version %q, and only 1.0.0 is known", layout.Version)
	}
	text, err := from.document("index.json")
	if err != nil {
		return nil, err
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("read index.json: %w", err)
	}
	groups := groupByName(index.Manifests)
	if err := checkCount(len(groups), opts); err != nil {
		return nil, err
	}
	var images []Image
	for _, group := range groups {
		one := group.manifests[0]
		if len(group.manifests) > 1 { // one image, for several platforms
			if one, err = choose(group.manifests, want.platform); err != nil {
				return nil, err
			}
		}
		document, err := from.manifest(ctx, one.Digest.String())
		if err != nil {
			return nil, err
		}
		image, err := s.add(ctx, from, document, want)
		if err != nil {
			return nil, err
		}
		named, err := s.nameAll(ctx, image, group.names(), opts)
		if err != nil {
			return nil, err
		}
		images = append(images, named...)
	}
	return images, nil
}

// layoutGroup is what an index has under one name.
type layoutGroup struct {
	name      string
	manifests []v1.Descriptor
}

func (g layoutGroup) names() []string {
	if g.name == "" {
		return nil
	}
	return []string{g.name}
}

// groupByName puts together what has the same name, in the order of the first of each.
func groupByName(manifests []v1.Descriptor) []layoutGroup {
	var groups []layoutGroup
	at := map[string]int{}
	for _, m := range manifests {
		name := m.Annotations[nameAnnotation]
		if name == "" {
			name = m.Annotations[tagAnnotation]
		}
		i, ok := at[name]
		if !ok {
			i = len(groups)
			at[name] = i
			groups = append(groups, layoutGroup{name: name})
		}
		groups[i].manifests = append(groups[i].manifests, m)
	}
	return groups
}

// layoutDir is an OCI layout in a directory.
type layoutDir struct{ root *os.Root }

func (l layoutDir) open(name string) (*os.File, error) {
	// Without blocking: a pipe would wait for a writer.
	file, err := l.root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file", name)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

func (l layoutDir) document(name string) ([]byte, error) {
	file, err := l.open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	return readDocument(file, "")
}

func (l layoutDir) manifest(_ context.Context, digest string) ([]byte, error) {
	digits, err := hexOf(digest)
	if err != nil {
		return nil, err
	}
	file, err := l.open(path.Join("blobs", algorithm, digits))
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	return readDocument(file, digest)
}

func (l layoutDir) blob(ctx context.Context, s *Store, want v1.Descriptor, report func(done int64)) error {
	return s.copyBlob(ctx, want, func() (io.ReadCloser, error) {
		file, err := l.open(path.Join("blobs", algorithm, want.Digest.Hex))
		if err != nil {
			return nil, err
		}
		return reporter{file, report, new(int64)}, nil
	})
}

// reporter tells how much of a file has been read. It has no other methods of a file's, by
// which it could be read unseen.
type reporter struct {
	io.ReadCloser
	report func(done int64)
	done   *int64
}

func (r reporter) Read(b []byte) (int, error) {
	n, err := r.ReadCloser.Read(b)
	*r.done += int64(n)
	r.report(*r.done)
	return n, err
}
