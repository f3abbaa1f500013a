// Package commit makes an OCI image of a VM: of the layers of the image that the VM was made
// from, and one of what differs between them and its root file system. Where the image has no
// layers, one has all of it.
package commit

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	spec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/stream"
	"github.com/smolvm/smolvm/internal/workspace"
)

// Config is the configuration of an image, as docker has it.
type Config = spec.DockerOCIImage

// Guest is the guest that an image is made of.
type Guest interface {
	// Root writes what differs between the guest's root file system and a list; see package
	// agent.
	Root(ctx context.Context, list io.Reader, w io.Writer, request wire.RootRequest) error
}

// Store is where images are.
type Store interface {
	Hold(ctx context.Context) (release func(), err error)
	Document(digest string) ([]byte, error)
	AddLayer(ctx context.Context, r io.Reader) (ocistore.Layer, error)
	AddImage(ctx context.Context, ref ociref.Ref, config []byte, layers []ocistore.Layer) (ocistore.Image, error)
}

// Options are the options of [Image].
type Options struct {
	// Base is the image that the VM was made from; nil: it has no layers.
	Base *ocistore.Image
	// Layers open those of Base.
	Layers []ocilayer.Layer
	// Config is what the VM's image says of its program if Base is nil; it may be nil.
	Config *smolvm.ImageConfig
	// Name is the name that the image gets. The zero value is none.
	Name ociref.Ref
	// Author and Message are kept with the image.
	Author, Message string
	// Change changes its configuration; nil: it is that of Base.
	Change func(ctx context.Context, config *Config) error
	// Pause holds what runs in the guest meanwhile.
	Pause bool
	// Arch is the architecture of guests, as Go names it.
	Arch string
	// Now is when the image is made.
	Now time.Time
}

// Image makes an image of a guest.
func Image(ctx context.Context, guest Guest, store Store, opts Options) (ocistore.Image, error) {
	release, err := store.Hold(ctx)
	if err != nil {
		return ocistore.Image{}, err
	}
	defer release()
	config, err := opts.config(store)
	if err != nil {
		return ocistore.Image{}, err
	}
	if opts.Change != nil { // before anything takes long
		if err := opts.Change(ctx, &config); err != nil {
			return ocistore.Image{}, err
		}
	}
	layer, err := addRoot(ctx, guest, store, opts)
	if err != nil {
		return ocistore.Image{}, err
	}
	var layers []ocistore.Layer
	if opts.Base != nil {
		layers = append(layers, opts.Base.Layers...)
	}
	config.Created = &opts.Now
	config.Author = opts.Author
	config.History = append(config.History, ocispec.History{Created: &opts.Now, CreatedBy: "smolvm image commit", Author: opts.Author, Comment: opts.Message})
	document, err := json.Marshal(config)
	if err != nil {
		return ocistore.Image{}, fmt.Errorf("write configuration: %w", err)
	}
	return store.AddImage(ctx, opts.Name, document, append(layers, layer))
}

// config returns the configuration to begin with.
func (o Options) config(store Store) (Config, error) {
	config := Config{Image: ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: o.Arch}}}
	if o.Base == nil {
		setConfig(&config, o.Config)
		return config, nil
	}
	document, err := store.Document(o.Base.Config)
	if err == nil {
		err = json.Unmarshal(document, &config)
	}
	if err != nil {
		return config, fmt.Errorf("read configuration of its image: %w", err)
	}
	return config, nil
}

// setConfig sets what an image says of its program.
func setConfig(config *Config, from *smolvm.ImageConfig) {
	if from == nil {
		return
	}
	inner := &config.Config.ImageConfig
	inner.Entrypoint, inner.Cmd, inner.Env, inner.WorkingDir, inner.User = from.Entrypoint, from.Cmd, from.Env, from.WorkingDir, from.User
	inner.StopSignal, inner.Labels = from.StopSignal, from.Labels
	inner.ExposedPorts, inner.Volumes = set(from.ExposedPorts), set(from.Volumes)
	health := from.Healthcheck
	if health == nil {
		return
	}
	how := "CMD"
	if health.Shell {
		how = "CMD-SHELL"
	}
	config.Config.Healthcheck = &spec.HealthcheckConfig{
		Test: append([]string{how}, health.Command...), Interval: health.Interval, Timeout: health.Timeout,
		StartPeriod: health.StartPeriod, StartInterval: health.StartInterval, Retries: health.Retries,
	}
}

func set(names []string) map[string]struct{} {
	var all map[string]struct{}
	for _, name := range names {
		if all == nil {
			all = map[string]struct{}{}
		}
		all[name] = struct{}{}
	}
	return all
}

// addRoot stores the layer of what differs.
func addRoot(ctx context.Context, guest Guest, store Store, opts Options) (layer ocistore.Layer, err error) {
	list := func(ctx context.Context, w io.Writer) error {
		if opts.Base == nil {
			return nil
		}
		return workspace.WriteBase(ctx, w, opts.Layers, ocilayer.Limits{})
	}
	archive := func(ctx context.Context, w io.Writer) error {
		return stream.Feed(ctx, list, func(list io.Reader) error {
			return workspace.Checked(ctx, w, ocilayer.Limits{}, func(ctx context.Context, out io.Writer) error {
				return guest.Root(ctx, list, out, wire.RootRequest{Pause: opts.Pause})
			})
		})
	}
	err = stream.Feed(ctx, archive, func(r io.Reader) (err error) {
		layer, err = store.AddLayer(ctx, r)
		return err
	})
	return layer, err
}
