package ocistore

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/smolvm/smolvm/internal/image/ociref"
)

// Export writes an image as an archive that `docker load`, `podman load` and [Store.Import] read:
// an OCI layout as tar, with docker's manifest.json beside it. Equal images make equal archives.
func (s *Store) Export(ctx context.Context, image Image, w io.Writer) error {
	archive := tar.NewWriter(w)
	err := s.export(ctx, image, func(name string, size int64, content io.Reader) error {
		if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size}); err != nil {
			return err
		}
		_, err := io.Copy(archive, content)
		return err
	})
	if err == nil {
		err = archive.Close()
	}
	if err != nil {
		return fmt.Errorf("export image %s: %w", image.Name, err)
	}
	return nil
}

// ExportDir writes an image as an OCI layout, which is a directory. It is made, or is there and
// empty.
func (s *Store) ExportDir(ctx context.Context, image Image, dir string) error {
	err := s.exportDir(ctx, image, dir)
	if err != nil {
		return fmt.Errorf("export image %s: %w", image.Name, err)
	}
	return nil
}

func (s *Store) exportDir(ctx context.Context, image Image, dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, "blobs", algorithm), 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	return s.export(ctx, image, func(name string, _ int64, content io.Reader) error {
		file, err := root.OpenFile(filepath.FromSlash(name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		_, err = io.Copy(file, content)
		return errors.Join(err, file.Close())
	})
}

// export gives out the files of an OCI layout, those that others name first.
func (s *Store) export(ctx context.Context, image Image, put func(name string, size int64, content io.Reader) error) error {
	release, err := s.share(ctx)
	if err != nil {
		return err
	}
	defer release()
	manifest, err := s.readDocument(image.Digest)
	if err != nil {
		return err
	}
	_, parts, err := s.parse(manifest)
	if err != nil {
		return err
	}
	done := map[string]bool{}
	docker := dockerImage{Config: blobName(parts[0].Digest), RepoTags: []string{}}
	for i, part := range parts {
		if i > 0 {
			docker.Layers = append(docker.Layers, blobName(part.Digest))
		}
		if done[part.Digest.Hex] {
			continue
		}
		done[part.Digest.Hex] = true
		if err := s.exportBlob(ctx, part, put); err != nil {
			return err
		}
	}
	index, tag, err := layoutIndex(image, manifest)
	if err != nil {
		return err
	}
	if tag != "" {
		docker.RepoTags = append(docker.RepoTags, tag)
	}
	list, err := json.Marshal([]dockerImage{docker})
	if err != nil {
		return err
	}
	for _, file := range []struct {
		name    string
		content []byte
	}{
		{path.Join("blobs", algorithm, strings.TrimPrefix(image.Digest, digestPrefix)), manifest},
		{"manifest.json", list},
		{"index.json", index},
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
	} {
		if err := put(file.name, int64(len(file.content)), bytes.NewReader(file.content)); err != nil {
			return err
		}
	}
	return nil
}

func blobName(hash v1.Hash) string { return path.Join("blobs", hash.Algorithm, hash.Hex) }

func (s *Store) exportBlob(ctx context.Context, part v1.Descriptor, put func(name string, size int64, content io.Reader) error) error {
	file, err := os.Open(s.blobPath(part.Digest.Hex))
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	return put(blobName(part.Digest), part.Size, contextReader{ctx, file})
}

// layoutIndex returns the index of a layout with one image, and the image's name if it has a tag.
func layoutIndex(image Image, manifest []byte) (index []byte, tag string, err error) {
	kind := types.OCIManifestSchema1
	var declared struct {
		MediaType types.MediaType `json:"mediaType"`
	}
	if err := json.Unmarshal(manifest, &declared); err == nil && declared.MediaType != "" {
		kind = declared.MediaType
	}
	described, err := describe(image.Digest, kind, int64(len(manifest)))
	if err != nil {
		return nil, "", err
	}
	if ref, err := ociref.Parse(image.Name); image.Name != "" && err == nil && !ref.Pinned() {
		tag = ref.String()
		described.Annotations = map[string]string{nameAnnotation: tag, tagAnnotation: ref.Tag}
	}
	index, err = json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{described}})
	return index, tag, err
}
