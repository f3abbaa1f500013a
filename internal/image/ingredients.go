package image

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/smolvm/smolvm"
)

// Ingredients are the files that the default image is made from, as the distribution's
// packages have them.
type Ingredients struct {
	// Kernel is the kernel's file, and ModulesDir the directory with all of its modules,
	// which holds one directory for the kernel's release.
	Kernel, ModulesDir string
	// Rootfs is the tree of the root file system, with busybox in it.
	Rootfs string
}

// Gather fetches the ingredients of the default image into dir, which must be there and be
// empty: for who makes another image of them. Progress is told of each phase; it may be nil.
func Gather(ctx context.Context, dir string, progress func(smolvm.Progress)) (Ingredients, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Ingredients{}, fmt.Errorf("gather ingredients: %w", err)
	}
	b := builder{recipe: Recipe{Progress: progress}, work: dir}
	found, err := b.gather(ctx)
	if err != nil {
		return Ingredients{}, fmt.Errorf("gather ingredients: %w", err)
	}
	return Ingredients{Kernel: found.kernel, ModulesDir: found.modules, Rootfs: found.rootfs}, nil
}
