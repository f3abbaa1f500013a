package manager

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/catalog"
	"github.com/smolvm/smolvm/internal/distroimage"
)

// newPackaged returns the images of the distribution's packages.
func (m *Manager) newPackaged(all *catalog.Catalog) *distroimage.Images {
	return &distroimage.Images{
		Catalog: all, Dir: filepath.Join(m.dir.Cache(), "packages"), Open: m.openWorkspace, Remove: m.RemoveImage,
	}
}

// PruneCaches removes what builds of images of packages have fetched and kept for the next one,
// unless one is under way, and returns how many bytes that freed.
func (m *Manager) PruneCaches(ctx context.Context) (int64, error) {
	began := time.Now()
	freed, err := m.packaged.Prune()
	if freed > 0 {
		m.note(ctx, "", "cache-prune", began, fmt.Sprintf("%d bytes", freed))
	}
	return freed, err
}

// buildPackaged builds an image of packages.
func (m *Manager) buildPackaged(ctx context.Context, opts smolvm.BuildOptions) (smolvm.Image, error) {
	began := time.Now()
	fail := func(err error) (smolvm.Image, error) {
		return smolvm.Image{}, fmt.Errorf("build image of packages: %w", err)
	}
	if opts.Rootfs != "" || opts.Kernel != "" || opts.ModulesDir != "" {
		return fail(errors.New("it has the distribution's root file system and kernel: give either packages or files"))
	}
	if err := m.budget.Check(); err != nil {
		return fail(err)
	}
	built, err := m.packaged.Build(ctx, opts)
	if err != nil {
		return fail(err)
	}
	m.note(ctx, "", "image-build", began, opts.Name+" "+built.Digest)
	return built, nil
}
