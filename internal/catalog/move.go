package catalog

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
)

// Import takes OCI images from elsewhere, and makes them bootable.
func (c *Catalog) Import(ctx context.Context, opts smolvm.ImportOptions) ([]smolvm.Image, error) {
	images, err := c.importImages(ctx, opts)
	if err != nil {
		return nil, err
	}
	made := []smolvm.Image{}
	seen := map[string]bool{} // one image may have several names
	for _, oci := range images {
		if seen[oci.Digest] {
			continue
		}
		seen[oci.Digest] = true
		one, err := c.Boot(ctx, oci, opts.Progress)
		if err != nil {
			return nil, err
		}
		made = append(made, one)
	}
	return made, nil
}

func (c *Catalog) importImages(ctx context.Context, opts smolvm.ImportOptions) ([]ocistore.Image, error) {
	if err := CheckPlatform(opts.Platform); err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	from := ocistore.ImportOptions{Platform: opts.Platform, Progress: layerProgress("import", opts.Progress)}
	if opts.Name != "" {
		var err error
		if from.Name, err = ociref.Parse(opts.Name); err != nil {
			return nil, err
		}
	}
	switch {
	case opts.Archive != nil && opts.Dir == "" && !opts.Daemon:
		return c.OCI.Import(ctx, opts.Archive, from)
	case opts.Archive == nil && opts.Dir != "" && !opts.Daemon:
		return c.OCI.ImportDir(ctx, opts.Dir, from)
	case opts.Archive == nil && opts.Dir == "" && opts.Daemon && opts.Name != "":
		return c.fromDaemon(ctx, opts.Socket, from)
	}
	return nil, errors.New("import image: give an archive, a directory, or a daemon and the image's name")
}

// fromDaemon takes an image from the daemon at a socket, or from the first daemon that has it.
func (c *Catalog) fromDaemon(ctx context.Context, socket string, opts ocistore.ImportOptions) ([]ocistore.Image, error) {
	sockets := []string{socket}
	if socket == "" {
		sockets = ocistore.DaemonSockets()
	}
	var errs []error
	for _, path := range sockets {
		if _, err := os.Stat(path); socket == "" && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		image, err := c.OCI.PullDaemon(ctx, path, opts.Name, opts)
		if err == nil {
			return []ocistore.Image{image}, nil
		}
		if ctx.Err() != nil {
			return nil, err
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return nil, &smolvm.Error{Err: fmt.Errorf("import image %s: no daemon of docker or podman is here: none of the sockets %q is", opts.Name, sockets), Hint: "name its socket, or import an archive of `docker save`"}
	}
	return nil, errors.Join(errs...)
}

// requireOCI finds an OCI image. The error matches [smolvm.ErrUnsupported] if it is an image without
// layers.
func (c *Catalog) requireOCI(ctx context.Context, text string) (ocistore.Image, error) {
	found, err := c.Find(ctx, text)
	if err != nil {
		return ocistore.Image{}, err
	}
	return c.ociOf(text, found)
}

// ociOf returns the OCI image of an image that was found.
func (c *Catalog) ociOf(text string, found smolvm.Image) (ocistore.Image, error) {
	if found.OCI == nil {
		return ocistore.Image{}, fmt.Errorf("image %q: %w: it was made of files or packages, and has no layers", text, smolvm.ErrUnsupported)
	}
	oci, err := c.findOCI(text)
	if errors.Is(err, smolvm.ErrImageNotFound) { // it was found by its own digest
		oci, err = c.findOCI(found.OCI.Digest)
	}
	if errors.Is(err, smolvm.ErrImageNotFound) {
		return ocistore.Image{}, &smolvm.Error{Err: fmt.Errorf("image %q: %w: its layers are not here any more, as no name led to them", text, smolvm.ErrUnsupported), Hint: "pull it again"}
	}
	return oci, err
}

// Export writes an OCI image.
func (c *Catalog) Export(ctx context.Context, text string, opts smolvm.ExportOptions) error {
	oci, err := c.requireOCI(ctx, text)
	switch {
	case err != nil:
		return err
	case opts.Archive != nil && opts.Dir == "":
		return c.OCI.Export(ctx, oci, opts.Archive)
	case opts.Archive == nil && opts.Dir != "":
		return c.OCI.ExportDir(ctx, oci, opts.Dir)
	}
	return errors.New("export image: give an archive or a directory")
}

// Push sends an OCI image to the registry of its name.
func (c *Catalog) Push(ctx context.Context, text string, opts smolvm.PushOptions) error {
	oci, err := c.requireOCI(ctx, text)
	if err != nil {
		return err
	}
	ref, err := ociref.Parse(text)
	if err != nil || ref.String() != oci.Name {
		return &smolvm.Error{Err: fmt.Errorf("push %q: give the name by which the registry is to have it", text), Hint: "`smolvm image tag IMAGE NAME` gives it one"}
	}
	return c.OCI.Push(ctx, oci, ref, ocistore.PushOptions{Progress: layerProgress("push "+ref.Familiar(), opts.Progress)})
}

// Tag has another name mean an OCI image too.
func (c *Catalog) Tag(ctx context.Context, text, name string) (smolvm.Image, error) {
	oci, err := c.requireOCI(ctx, text)
	if err != nil {
		return smolvm.Image{}, err
	}
	ref, err := ociref.Parse(name)
	if err != nil {
		return smolvm.Image{}, err
	}
	if ref.Pinned() {
		return smolvm.Image{}, fmt.Errorf("tag %q: a digest is that of its image for ever: give a tag", name)
	}
	if err := c.OCI.Tag(ctx, oci, ref); err != nil {
		return smolvm.Image{}, err
	}
	return c.Find(ctx, ref.String())
}

// History returns the steps by which an image was made, the earliest first.
func (c *Catalog) History(ctx context.Context, text string) ([]smolvm.ImageStep, error) {
	found, err := c.Find(ctx, text)
	if err != nil {
		return nil, err
	}
	if found.OCI == nil {
		return []smolvm.ImageStep{{CreatedAt: found.CreatedAt, CreatedBy: found.Source}}, nil
	}
	oci, err := c.ociOf(text, found)
	if err != nil {
		return nil, err
	}
	steps, err := c.OCI.History(oci)
	if err != nil {
		return nil, err
	}
	told := []smolvm.ImageStep{}
	for _, step := range steps {
		one := smolvm.ImageStep{CreatedAt: step.CreatedAt, CreatedBy: step.CreatedBy, Comment: step.Comment}
		if step.Layer != nil {
			one.Layer, one.Size = step.Layer.Digest, step.Layer.Size
		}
		told = append(told, one)
	}
	return told, nil
}
