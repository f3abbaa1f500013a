package catalog

import (
	"cmp"
	"context"
	"errors"
	"os"
	"slices"
	"syscall"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ocistore"
)

// trim removes OCI images, the least recently used first, until those that are left take at most
// MaxBytes. Those go whose names all came from registries, where they can be had again; what was
// built, imported, committed or tagged here stays, and so do the image that is kept and those in use.
func (c *Catalog) trim(ctx context.Context, kept string) error {
	if c.MaxBytes <= 0 {
		return nil
	}
	groups, err := c.oldest()
	if err != nil {
		return err
	}
	for _, group := range groups {
		taken, err := c.usage(ctx)
		if err != nil || taken <= c.MaxBytes {
			return err
		}
		if group.digest == kept || !group.pulled {
			continue
		}
		if err := c.drop(ctx, group); err != nil {
			return err
		}
	}
	return nil
}

// group is all names of one OCI image.
type group struct {
	digest string
	names  []ocistore.Image
	pulled bool // all of them were
}

// oldest returns the OCI images, the least recently used first.
func (c *Catalog) oldest() ([]group, error) {
	images, err := c.OCI.List()
	if err != nil {
		return nil, err
	}
	slices.SortFunc(images, func(a, b ocistore.Image) int { return cmp.Or(b.UsedAt.Compare(a.UsedAt), cmp.Compare(a.Name, b.Name)) })
	var groups []group
	for _, one := range images { // the most recently used first
		i := slices.IndexFunc(groups, func(g group) bool { return g.digest == one.Digest })
		if i < 0 {
			i = len(groups)
			groups = append(groups, group{digest: one.Digest, pulled: true})
		}
		groups[i].names = append(groups[i].names, one)
		groups[i].pulled = groups[i].pulled && one.Pulled
	}
	slices.Reverse(groups)
	return groups, nil
}

// usage returns how many bytes OCI images take: their blobs, and the root file systems that were
// made of them.
func (c *Catalog) usage(ctx context.Context) (int64, error) {
	total, err := c.OCI.Usage()
	if err != nil {
		return 0, err
	}
	images, err := c.Bootable.List(ctx)
	if err != nil {
		return 0, err
	}
	seen := map[uint64]bool{} // images with other kernels share one
	for _, made := range images {
		if made.OCI == nil {
			continue
		}
		info, err := os.Stat(made.RootfsPath)
		if err != nil {
			continue // removed in between, or damaged
		}
		const blockSize = 512 // of st_blocks; see stat(3type)
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && !seen[stat.Ino] {
			seen[stat.Ino] = true
			total += stat.Blocks * blockSize
		}
	}
	return total, nil
}

// drop removes an OCI image and what was made of it, unless it is in use.
func (c *Catalog) drop(ctx context.Context, g group) error {
	images, err := c.Bootable.List(ctx)
	if err != nil {
		return err
	}
	for _, made := range images {
		if made.OCI == nil || made.OCI.Digest != g.digest {
			continue
		}
		err := c.Bootable.Remove(ctx, made.Digest, func() error { return c.InUse(ctx, made.Digest) })
		if errors.Is(err, smolvm.ErrImageInUse) {
			return nil
		}
		if err != nil && !errors.Is(err, smolvm.ErrImageNotFound) {
			return err
		}
	}
	return c.removeNames(ctx, g.names)
}
