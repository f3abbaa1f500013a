// Package catalog joins the two stores of images. What VMs boot is in that of package image.
// OCI images, with their layers and names, are in that of package ocistore, and each that is
// to be run is made bootable: with the kernel and the initramfs of the default image, and a
// root file system of its layers.
package catalog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/ociconfig"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/image/registries"
)

// Catalog finds images in both stores.
type Catalog struct {
	Bootable *image.Store
	OCI      *ocistore.Store
	// Base returns the image whose kernel and initramfs the others have, and makes it if it is
	// missing or out of date.
	Base func(ctx context.Context, progress func(smolvm.Progress)) (smolvm.Image, error)
	// IsBuiltIn reports whether a name is that of an image that is built when it is first needed,
	// beside the default one. Nil: there are none.
	IsBuiltIn func(name string) bool
	// MaxBytes is how much OCI images that were pulled may take together, before those that
	// were not used for longest are removed. Zero: as much as there is.
	MaxBytes int64
	// InUse returns an error that matches [smolvm.ErrImageInUse] if something is based on an
	// image. It is needed with MaxBytes only.
	InUse func(ctx context.Context, digest string) error
}

// Find finds an image by a name of our own, by its digest or the beginning of that, by the name
// of an OCI image, or by the digest of its manifest. It makes nothing: of an OCI image that
// is not bootable yet, Digest is empty. The error matches [smolvm.ErrImageNotFound].
func (c *Catalog) Find(ctx context.Context, text string) (smolvm.Image, error) {
	found, err := c.Bootable.Get(ctx, text)
	if err == nil {
		found.Hides = c.hidden(found.Names)
		return c.named(found)
	}
	if !errors.Is(err, smolvm.ErrImageNotFound) {
		return smolvm.Image{}, err
	}
	oci, ociErr := c.findOCI(text)
	if errors.Is(ociErr, smolvm.ErrImageNotFound) {
		return smolvm.Image{}, err // which has the better hint
	}
	if ociErr != nil {
		return smolvm.Image{}, ociErr
	}
	found, err = c.Bootable.FindLayered(oci.Digest)
	if errors.Is(err, smolvm.ErrImageNotFound) {
		found, err = unmade(oci), nil
	}
	if err != nil {
		return smolvm.Image{}, err
	}
	return c.named(found)
}

// findOCI finds an OCI image by its name, or by the digest of its manifest or the beginning of
// that. The error matches [smolvm.ErrImageNotFound].
func (c *Catalog) findOCI(text string) (ocistore.Image, error) {
	for _, ref := range meanings(text) {
		found, err := c.OCI.Get(ref)
		if !errors.Is(err, smolvm.ErrImageNotFound) {
			return found, err
		}
	}
	beginning := strings.TrimPrefix(text, "sha256:")
	if len(beginning) < image.MinAbbreviation || strings.Trim(beginning, "0123456789abcdef") != "" {
		return ocistore.Image{}, fmt.Errorf("%q: %w", text, smolvm.ErrImageNotFound)
	}
	images, err := c.OCI.List()
	if err != nil {
		return ocistore.Image{}, err
	}
	images = slices.DeleteFunc(images, func(i ocistore.Image) bool { return !strings.HasPrefix(i.Digest, "sha256:"+beginning) })
	switch {
	case len(images) == 0:
		return ocistore.Image{}, fmt.Errorf("%q: %w", text, smolvm.ErrImageNotFound)
	case slices.ContainsFunc(images, func(i ocistore.Image) bool { return i.Digest != images[0].Digest }):
		return ocistore.Image{}, fmt.Errorf("image %q: several digests begin so; give more of it", text)
	}
	return images[0], nil
}

// meanings returns the names of OCI images that a text may mean, the one that counts first: a
// name of our own hides that of a registry.
func meanings(text string) []ociref.Ref {
	var refs []ociref.Ref
	if text != "" && !strings.ContainsAny(text, "/:@") {
		refs = append(refs, ociref.Builtin(text))
	}
	if ref, err := ociref.Parse(text); err == nil {
		refs = append(refs, ref)
	}
	return refs
}

// unmade returns an OCI image that is not bootable.
func unmade(oci ocistore.Image) smolvm.Image {
	_, arch, _ := strings.Cut(oci.Platform, "/")
	arch, _, _ = strings.Cut(arch, "/")
	return smolvm.Image{
		Names: []string{}, Arch: arch, Source: oci.Name, CreatedAt: oci.AddedAt,
		OCI: &smolvm.OCIImage{Digest: oci.Digest, Reference: oci.Name},
	}
}

// hidden returns the whole names of the OCI images that names of ours hide.
func (c *Catalog) hidden(ours []string) []string {
	var hidden []string
	for _, name := range ours {
		ref, err := ociref.Parse(name)
		if err != nil {
			continue
		}
		if _, err := c.OCI.Get(ref); !errors.Is(err, smolvm.ErrImageNotFound) {
			hidden = append(hidden, ref.String())
		}
	}
	return hidden
}

// named adds the names that lead to an image by its OCI image.
func (c *Catalog) named(found smolvm.Image) (smolvm.Image, error) {
	if found.OCI == nil {
		return found, nil
	}
	names, err := c.OCI.Names()
	if err != nil {
		return smolvm.Image{}, err
	}
	return c.withNames(found, names), nil
}

// withNames adds the names of its OCI image to an image, given those of all, unless another one has
// taken its place.
func (c *Catalog) withNames(found smolvm.Image, names map[string][]string) smolvm.Image {
	if found.OCI == nil {
		return found
	}
	if now, err := c.Bootable.FindLayered(found.OCI.Digest); err == nil && now.Digest != found.Digest {
		return found
	}
	found.Names = append(found.Names, familiars(names[found.OCI.Digest])...)
	return found
}

// familiars returns names as people write them.
func familiars(names []string) []string {
	var short []string
	for _, name := range names {
		short = append(short, familiar(name))
	}
	return short
}

// familiar returns the shortest form of a whole name.
func familiar(name string) string {
	ref, err := ociref.Parse(name)
	if err != nil {
		return name
	}
	return ref.Familiar()
}

// List returns all images, the oldest first, with their names and sizes: the bootable ones, and
// the OCI images that are not.
func (c *Catalog) List(ctx context.Context) ([]smolvm.Image, error) {
	images, err := c.Bootable.List(ctx)
	if err != nil {
		return nil, err
	}
	all, err := c.OCI.List()
	if err != nil {
		return nil, err
	}
	names, made := map[string][]string{}, map[string]bool{}
	for _, oci := range all {
		names[oci.Digest] = append(names[oci.Digest], oci.Name)
	}
	for i := range images {
		images[i].Hides = c.hidden(images[i].Names)
		images[i] = c.withNames(images[i], names)
		if oci := images[i].OCI; oci != nil {
			made[oci.Digest] = true
		}
	}
	for _, oci := range all {
		if made[oci.Digest] {
			continue
		}
		made[oci.Digest] = true
		one := unmade(oci)
		one.Names, one.Size = familiars(names[oci.Digest]), oci.Size
		images = append(images, one)
	}
	slices.SortStableFunc(images, func(a, b smolvm.Image) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return images, nil
}

// Ensure finds an image to boot. An OCI image is pulled as the policy has it, and made bootable;
// see [smolvm.PullPolicy]. The error matches [smolvm.ErrImageNotFound] if it is not here, and
// not to be pulled or not to be had.
func (c *Catalog) Ensure(ctx context.Context, text string, policy smolvm.PullPolicy, progress func(smolvm.Progress)) (smolvm.Image, error) {
	found, err := c.Bootable.Get(ctx, text)
	if !errors.Is(err, smolvm.ErrImageNotFound) {
		return found, err
	}
	ref, nameErr := ociref.Parse(text)
	if policy == smolvm.PullAlways && nameErr == nil {
		return c.Pull(ctx, text, smolvm.PullOptions{Progress: progress})
	}
	oci, ociErr := c.findOCI(text)
	switch {
	case ociErr == nil:
		if err := c.OCI.Use(oci); err != nil {
			return smolvm.Image{}, err
		}
		return c.Boot(ctx, oci, progress)
	case !errors.Is(ociErr, smolvm.ErrImageNotFound):
		return smolvm.Image{}, ociErr
	case nameErr != nil:
		return smolvm.Image{}, notFound(text, nameErr)
	case policy == smolvm.PullNever:
		return smolvm.Image{}, err
	}
	pulled, err := c.Pull(ctx, text, smolvm.PullOptions{Progress: progress})
	if err != nil && ctx.Err() == nil && !errors.Is(err, smolvm.ErrUnsupported) && !errors.Is(err, smolvm.ErrDiskBudget) {
		err = notFound(text, fmt.Errorf("no image of that name is here, and %s can't be had: %w", ref, err))
	}
	return pulled, err
}

// notFound returns the error of an image that is not here, and why it is not fetched.
func notFound(text string, why error) error {
	return &smolvm.Error{
		Hint: cmp.Or(smolvm.HintOf(why), "`smolvm image ls` lists the images that are here"),
		Err:  fmt.Errorf("%q: %w: %w", text, smolvm.ErrImageNotFound, why),
	}
}

// NewName reads the name that an image is to get which is made here. One that means an image of
// smolvm's own is refused, as it would never mean this one.
func (c *Catalog) NewName(ctx context.Context, text string) (ociref.Ref, error) {
	ref, err := ociref.Parse(text)
	if err != nil {
		return ociref.Ref{}, err
	}
	own := text == smolvm.DefaultImage || c.IsBuiltIn != nil && c.IsBuiltIn(text)
	if !own {
		_, err := c.Bootable.Get(ctx, text)
		own = err == nil
	}
	switch {
	case own:
		return ociref.Ref{}, &smolvm.Error{
			Err:  fmt.Errorf("the name %q means an image of smolvm's own", text),
			Hint: "give the new image another, or one with a tag, such as " + text + ":mine",
		}
	case ref.Pinned():
		return ociref.Ref{}, fmt.Errorf("name %q of an image: a new image has no digest yet", text)
	}
	return ref, nil
}

// Fetch fetches an OCI image from the mirrors of its registry, or from that; see package
// registries.
func (c *Catalog) Fetch(ctx context.Context, ref ociref.Ref, platform string, progress func(ocistore.Progress)) (ocistore.Image, error) {
	mirrors, err := registries.Load()
	if err != nil {
		return ocistore.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	sources, err := mirrors.Sources(ref)
	if err != nil {
		return ocistore.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	return c.OCI.Pull(ctx, ref, ocistore.PullOptions{Sources: sources, Platform: platform, Progress: progress})
}

// Pull fetches an OCI image from its registry, and makes it bootable.
func (c *Catalog) Pull(ctx context.Context, text string, opts smolvm.PullOptions) (smolvm.Image, error) {
	ref, err := ociref.Parse(text)
	if err != nil {
		return smolvm.Image{}, err
	}
	if err := CheckPlatform(opts.Platform); err != nil {
		return smolvm.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	pulled, err := c.Fetch(ctx, ref, opts.Platform, layerProgress("pull "+ref.Familiar(), opts.Progress))
	if err != nil {
		return smolvm.Image{}, err
	}
	made, err := c.Boot(ctx, pulled, opts.Progress)
	if err != nil {
		return smolvm.Image{}, err
	}
	return made, c.trim(ctx, pulled.Digest)
}

// CheckPlatform checks that guests of this host can run what is for a platform.
func CheckPlatform(platform string) error {
	system, arch, _ := strings.Cut(platform, "/")
	arch, _, _ = strings.Cut(arch, "/")
	if platform == "" || system == "linux" && arch == runtime.GOARCH {
		return nil
	}
	return fmt.Errorf("platform %s: %w: guests on this host run linux/%s", platform, smolvm.ErrUnsupported, runtime.GOARCH)
}

// layerProgress returns what the fetching of layers reports to, which may be several goroutines.
func layerProgress(phase string, progress func(smolvm.Progress)) func(ocistore.Progress) {
	if progress == nil {
		return nil
	}
	var mu sync.Mutex
	return func(p ocistore.Progress) {
		mu.Lock()
		defer mu.Unlock()
		progress(smolvm.Progress{Phase: phase, Item: fmt.Sprintf("layer %d of %d", p.Number, p.Layers), Done: p.Done, Total: p.Total})
	}
}

// layers returns the layers of an OCI image, to be unpacked.
func (c *Catalog) layers(oci ocistore.Image) []ocilayer.Layer {
	var layers []ocilayer.Layer
	for _, layer := range oci.Layers {
		layers = append(layers, ocilayer.Layer{
			DiffID: layer.DiffID,
			Open:   func() (io.ReadCloser, error) { return c.OCI.OpenLayer(layer) },
		})
	}
	return layers
}

// Origin returns the OCI image that an image was made from, with its layers. The error matches
// [smolvm.ErrImageNotFound] if it was made from none, or if no name leads to that any more.
// Unless the store of OCI images is held it may be removed meanwhile.
func (c *Catalog) Origin(made smolvm.Image) (ocistore.Image, []ocilayer.Layer, error) {
	if made.OCI == nil {
		return ocistore.Image{}, nil, fmt.Errorf("image %s is of no OCI image: %w", made.Digest, smolvm.ErrImageNotFound)
	}
	oci, err := c.findOCI(made.OCI.Digest)
	if err != nil {
		return ocistore.Image{}, nil, err
	}
	return oci, c.layers(oci), nil
}

// Boot makes an OCI image bootable, unless it is.
func (c *Catalog) Boot(ctx context.Context, oci ocistore.Image, progress func(smolvm.Progress)) (smolvm.Image, error) {
	made, err := c.boot(ctx, oci, progress)
	if err != nil {
		return smolvm.Image{}, fmt.Errorf("make %s bootable: %w", cmp.Or(familiar(oci.Name), oci.Digest), err)
	}
	return c.named(made)
}

func (c *Catalog) boot(ctx context.Context, oci ocistore.Image, progress func(smolvm.Progress)) (smolvm.Image, error) {
	if err := CheckPlatform(oci.Platform); err != nil {
		return smolvm.Image{}, err
	}
	release, err := c.OCI.Hold(ctx)
	if err != nil {
		return smolvm.Image{}, err
	}
	defer release()
	document, err := c.OCI.Document(oci.Config)
	if err != nil {
		return smolvm.Image{}, err
	}
	config, err := ociconfig.Parse(document)
	if err != nil {
		return smolvm.Image{}, err
	}
	base, err := c.Base(ctx, progress)
	if err != nil {
		return smolvm.Image{}, err
	}
	recipe := image.Layered{
		OCI: smolvm.OCIImage{Digest: oci.Digest, Reference: oci.Name}, Config: config.Public(), Base: base.Digest,
		Progress: progress,
	}
	for _, layer := range oci.Layers {
		recipe.Sizes = append(recipe.Sizes, layer.Size)
	}
	recipe.Layers = c.layers(oci)
	made, err := c.Bootable.EnsureLayered(ctx, recipe)
	if wrong, ok := errors.AsType[*ocilayer.DiffIDError](err); ok {
		// So that the next pull fetches it again.
		err = errors.Join(err, c.OCI.Discard(oci.Layers[wrong.Layer].Digest))
		err = &smolvm.Error{Err: err, Hint: "pull the image again"}
	}
	return made, err
}
