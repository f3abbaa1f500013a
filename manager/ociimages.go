package manager

import (
	"context"
	"fmt"
	"time"

	"github.com/smolvm/smolvm"
)

// PullImage fetches an OCI image from its registry, and makes it bootable: with the kernel of
// the default image, which is built if it is missing. Layers that are there are not fetched
// again, and one that was cut off goes on where it was.
//
// The error matches [smolvm.ErrImageNotFound] if the registry has no such image,
// [smolvm.ErrUnsupported] if it is for another platform than this host's guests, and
// [smolvm.ErrDiskBudget].
func (m *Manager) PullImage(ctx context.Context, ref string, opts smolvm.PullOptions) (smolvm.Image, error) {
	began := time.Now()
	if err := m.budget.Check(); err != nil {
		return smolvm.Image{}, fmt.Errorf("pull image %q: %w", ref, err)
	}
	pulled, err := m.catalog.Pull(ctx, ref, opts)
	if err != nil {
		return smolvm.Image{}, err
	}
	m.note(ctx, "", "image-pull", began, ref+" "+pulled.OCI.Digest)
	return pulled, nil
}

// ImportImage takes OCI images from an archive, a layout or a daemon of docker or podman, and
// makes them bootable.
func (m *Manager) ImportImage(ctx context.Context, opts smolvm.ImportOptions) ([]smolvm.Image, error) {
	began := time.Now()
	if err := m.budget.Check(); err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	images, err := m.catalog.Import(ctx, opts)
	if err != nil {
		return nil, err
	}
	for _, image := range images {
		m.note(ctx, "", "image-import", began, image.OCI.Reference+" "+image.OCI.Digest)
	}
	return images, nil
}

// ExportImage writes an OCI image. The error matches [smolvm.ErrUnsupported] if the image was
// made of files or packages, and so has no layers.
func (m *Manager) ExportImage(ctx context.Context, ref string, opts smolvm.ExportOptions) error {
	return m.catalog.Export(ctx, ref, opts)
}

// PushImage sends an OCI image to the registry of its name. Layers that the registry has are
// not sent. The error matches [smolvm.ErrUnsupported] as that of ExportImage.
func (m *Manager) PushImage(ctx context.Context, ref string, opts smolvm.PushOptions) error {
	began := time.Now()
	if err := m.catalog.Push(ctx, ref, opts); err != nil {
		return err
	}
	m.note(ctx, "", "image-push", began, ref)
	return nil
}

// TagImage has another name mean an OCI image too. The error matches [smolvm.ErrUnsupported] as
// that of ExportImage.
func (m *Manager) TagImage(ctx context.Context, ref, name string) (smolvm.Image, error) {
	return m.catalog.Tag(ctx, ref, name)
}

// ImageHistory returns the steps by which an image was made, the earliest first.
func (m *Manager) ImageHistory(ctx context.Context, ref string) ([]smolvm.ImageStep, error) {
	return m.catalog.History(ctx, ref)
}
