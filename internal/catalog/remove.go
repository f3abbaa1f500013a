package catalog

import (
	"context"
	"errors"
	"slices"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
)

// HasName reports whether a name leads to an image, as the store of bootable ones has it: one of
// its own or one of the OCI image that it was made of.
func (c *Catalog) HasName(found smolvm.Image) (bool, error) {
	found, err := c.named(found)
	return len(found.Names) > 0, err
}

// Untag removes a name of an OCI image if another leads to it still. It reports whether it did:
// else the bootable image is to be removed, and then [Catalog.Forget] called.
func (c *Catalog) Untag(ctx context.Context, text string, found smolvm.Image) (done bool, err error) {
	if found.OCI == nil {
		return false, nil
	}
	if _, err := c.Bootable.Get(ctx, text); err == nil {
		return false, nil // by its digest, or by a name of ours
	}
	for _, ref := range meanings(text) {
		oci, err := c.OCI.Get(ref)
		if errors.Is(err, smolvm.ErrImageNotFound) {
			continue
		}
		if err != nil {
			return false, err
		}
		names, err := c.OCI.Names()
		if err != nil || len(names[oci.Digest]) < 2 {
			return false, err
		}
		return true, c.OCI.Remove(ctx, ref)
	}
	return false, nil // it was found by its digest
}

// Forget removes the names of the OCI image that a removed image was made of, and what only they
// lead to.
func (c *Catalog) Forget(ctx context.Context, removed smolvm.Image) error {
	if removed.OCI == nil {
		return nil
	}
	if _, err := c.Bootable.FindLayered(removed.OCI.Digest); err == nil {
		return nil // another image of it is there
	}
	images, err := c.OCI.List()
	if err != nil {
		return err
	}
	images = slices.DeleteFunc(images, func(i ocistore.Image) bool { return i.Digest != removed.OCI.Digest })
	return c.removeNames(ctx, images)
}

// removeNames removes names of OCI images, and what only they lead to. Those that are gone are a
// success.
func (c *Catalog) removeNames(ctx context.Context, images []ocistore.Image) error {
	var errs []error
	for _, oci := range images {
		ref, err := ociref.Parse(oci.Name)
		if err == nil {
			err = c.OCI.Remove(ctx, ref)
		}
		if !errors.Is(err, smolvm.ErrImageNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Prune removes what no OCI image needs.
func (c *Catalog) Prune(ctx context.Context) error {
	_, err := c.OCI.Prune(ctx)
	return err
}
