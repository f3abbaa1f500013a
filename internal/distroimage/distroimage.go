// Package distroimage builds images of the packages of this host's distribution when they are
// wanted: those that have built-in names, and those of users' recipes. They are OCI images of two
// layers, of packages as they are unpacked, and of what their maintainer scripts make in a VM.
package distroimage

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/catalog"
	"github.com/smolvm/smolvm/internal/image/distro"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/workspace"
)

// Images are the images of packages in a data directory.
type Images struct {
	Catalog *catalog.Catalog
	// Dir is where apt's lists and downloads are kept.
	Dir string
	// Open makes a VM of an image to run commands in.
	Open func(ctx context.Context, image smolvm.Image, opts workspace.Options) (*workspace.Workspace, error)
	// Remove removes an image, given its digest, and what was made of it.
	Remove func(ctx context.Context, digest string) error
}

// memoryMiB is the memory of the VM that packages are configured in: dpkg's database is kept there.
const memoryMiB = 1024

// Ensure returns the image of a built-in name, and builds it if it is missing, or of a recipe that
// has changed since. With [smolvm.PullNever] nothing is fetched, and the error matches
// [smolvm.ErrImageNotFound].
func (i *Images) Ensure(ctx context.Context, name string, policy smolvm.PullPolicy, progress func(smolvm.Progress)) (smolvm.Image, error) {
	recipe, ok := distro.BuiltIn(name)
	if !ok {
		return smolvm.Image{}, fmt.Errorf("%q: %w", name, smolvm.ErrImageNotFound)
	}
	ref := ociref.Builtin(name)
	if found, ok, err := i.current(ctx, ref, recipe, progress); ok || err != nil {
		return found, err
	}
	if policy == smolvm.PullNever {
		return smolvm.Image{}, &smolvm.Error{Hint: fmt.Sprintf("`smolvm image build %s` builds it", name),
			Err: fmt.Errorf("%q: %w: it is built of the distribution's packages, which are not to be fetched", name, smolvm.ErrImageNotFound)}
	}
	return i.build(ctx, ref, recipe, false, progress)
}

// Build builds an image of packages, unless it is there. Of options, it uses Name, Packages, RecipeFile, Force and
// Progress. Without packages and a recipe the name has to be built in.
func (i *Images) Build(ctx context.Context, opts smolvm.BuildOptions) (smolvm.Image, error) {
	ref, recipe, err := asked(opts)
	if err != nil {
		return smolvm.Image{}, err
	}
	return i.build(ctx, ref, recipe, opts.Force, opts.Progress)
}

// asked returns what is to be built, and its name.
func asked(opts smolvm.BuildOptions) (ociref.Ref, distro.Recipe, error) {
	recipe := distro.Recipe{Packages: opts.Packages, Env: map[string]string{"LANG": "C.UTF-8"}, Command: []string{"bash"}}
	builtIn, isBuiltIn := distro.BuiltIn(opts.Name)
	switch {
	case opts.RecipeFile != "":
		var err error
		if recipe, err = distro.ReadRecipe(opts.RecipeFile); err != nil {
			return ociref.Ref{}, recipe, err
		}
		recipe.Packages = append(recipe.Packages, opts.Packages...)
	case len(opts.Packages) == 0 && isBuiltIn:
		return ociref.Builtin(opts.Name), builtIn, nil
	}
	name := cmp.Or(opts.Name, recipe.Name)
	if name == "" {
		return ociref.Ref{}, recipe, &smolvm.Error{Hint: "give it one by --name", Err: errors.New("the image has no name")}
	}
	if _, taken := distro.BuiltIn(name); taken || name == smolvm.DefaultImage {
		return ociref.Ref{}, recipe, &smolvm.Error{Hint: "give it another one by --name", Err: fmt.Errorf("%q is a built-in name of an image", name)}
	}
	ref, err := ociref.Parse(name)
	if err == nil && ref.Pinned() {
		err = fmt.Errorf("name %q of an image: it can't have a digest", name)
	}
	return ref, recipe, errors.Join(err, recipe.Check())
}

// current returns the image of a name if it was built of the recipe, and makes it bootable.
func (i *Images) current(ctx context.Context, ref ociref.Ref, recipe distro.Recipe, progress func(smolvm.Progress)) (smolvm.Image, bool, error) {
	found, err := i.Catalog.OCI.Get(ref)
	if errors.Is(err, smolvm.ErrImageNotFound) {
		return smolvm.Image{}, false, nil
	}
	if err != nil {
		return smolvm.Image{}, false, err
	}
	key, err := recipe.Key(hostRelease())
	if err != nil {
		return smolvm.Image{}, false, err
	}
	document, err := i.Catalog.OCI.Document(found.Config)
	if err != nil {
		return smolvm.Image{}, false, err
	}
	var config v1.ConfigFile
	if err := json.Unmarshal(document, &config); err != nil || config.Config.Labels[distro.KeyLabel] != key {
		return smolvm.Image{}, false, nil //nolint:nilerr // It is built anew.
	}
	made, err := i.Catalog.Boot(ctx, found, progress)
	return made, err == nil, err
}

func hostRelease() distro.Release { return distro.HostRelease(runtime.GOARCH) }

// build builds an image; of several processes that want the same one, one does the work.
func (i *Images) build(ctx context.Context, ref ociref.Ref, recipe distro.Recipe, force bool, progress func(smolvm.Progress)) (smolvm.Image, error) {
	builder := distro.Builder{Dir: i.Dir, Release: hostRelease(), Store: store{i, progress}, Open: i.open, Progress: progress}
	unlock, err := builder.Lock(ctx)
	if err != nil {
		return smolvm.Image{}, err
	}
	defer unlock()
	if !force {
		if found, ok, err := i.current(ctx, ref, recipe, progress); ok || err != nil {
			return found, err
		}
	}
	if ref.IsBuiltin() && progress != nil {
		progress(smolvm.Progress{Phase: fmt.Sprintf("build %s of the distribution's packages; docker.io/library/%[1]s is the registry's image of that name", ref.Familiar())})
	}
	// From its first layer to its name nothing of it is to be collected.
	release, err := i.Catalog.OCI.Hold(ctx)
	if err != nil {
		return smolvm.Image{}, err
	}
	defer release()
	return builder.Build(ctx, ref.String(), recipe)
}

// store is what a builder keeps layers and images in; it implements [distro.Store].
type store struct {
	images   *Images
	progress func(smolvm.Progress)
}

func (s store) AddLayer(ctx context.Context, archive io.Reader) (ocistore.Layer, error) {
	return s.images.Catalog.OCI.AddLayer(ctx, archive)
}

func (s store) AddImage(ctx context.Context, name string, config []byte, layers []ocistore.Layer) (smolvm.Image, error) {
	var ref ociref.Ref
	if name != "" {
		var err error
		if ref, err = ociref.Parse(name); err != nil {
			return smolvm.Image{}, err
		}
	}
	added, err := s.images.Catalog.OCI.AddImage(ctx, ref, config, layers)
	if err != nil {
		return smolvm.Image{}, err
	}
	return s.images.Catalog.Boot(ctx, added, s.progress)
}

func (s store) Forget(ctx context.Context, image smolvm.Image) error {
	return s.images.Remove(ctx, image.Digest)
}

// open opens a machine to configure packages in. It boots, as no other will be like it.
func (i *Images) open(ctx context.Context, image smolvm.Image) (distro.Machine, error) {
	opened, err := i.Open(ctx, image, workspace.Options{
		Cold: true,
		VM:   smolvm.VMConfig{MemoryMiB: memoryMiB, Network: smolvm.Network{Mode: smolvm.NetworkNone}},
	})
	if err != nil {
		return nil, err
	}
	return machine{opened}, nil
}

// machine is a workspace; it implements [distro.Machine].
type machine struct{ *workspace.Workspace }

func (m machine) Run(ctx context.Context, args []string, stdout, stderr io.Writer) (smolvm.ExitStatus, error) {
	return m.Workspace.Run(ctx, workspace.Command{Args: args, Stdout: stdout, Stderr: stderr, NoNetwork: true})
}
