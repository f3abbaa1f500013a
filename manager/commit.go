package manager

import (
	"context"
	"errors"
	"runtime"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/workspace/commit"
)

// CommitImage makes an image of a VM: of the layers of the VM's image and one of what differs in
// its root file system, or one of all of it where the image has no layers here. What is mounted
// in the guest and what smolvm itself writes there is left out, as are memory and processes. The
// name is that of an OCI image, such as app or ghcr.io/owner/app:1; empty: it has none. The
// configuration is that of the VM's image, with the changes.
//
// Commands in a VM that runs are held meanwhile; one that does not run is started for it, and
// stopped again. The error matches [smolvm.ErrInvalidState] if the VM is paused, and
// [smolvm.ErrUnsupported] if no agent is in the guest.
func (m *Manager) CommitImage(ctx context.Context, id, name string, opts smolvm.CommitOptions) (_ smolvm.Image, err error) {
	began := time.Now()
	var ref ociref.Ref
	if name != "" {
		if ref, err = m.catalog.NewName(ctx, name); err != nil {
			return smolvm.Image{}, vmError("make an image of", id, err)
		}
	}
	made, err := m.commit(ctx, id, ref, opts)
	if err != nil {
		return smolvm.Image{}, vmError("make an image of", id, err)
	}
	m.note(ctx, id, "image-commit", began, made.OCI.Digest)
	return made, nil
}

func (m *Manager) commit(ctx context.Context, id string, ref ociref.Ref, opts smolvm.CommitOptions) (made smolvm.Image, err error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return smolvm.Image{}, err
	}
	if err := m.budget.Check(); err != nil {
		return smolvm.Image{}, err
	}
	// Until the image is bootable, what is added has no other use.
	release, err := m.catalog.OCI.Hold(ctx)
	if err != nil {
		return smolvm.Image{}, err
	}
	defer release()
	options := commit.Options{
		Name: ref, Author: opts.Author, Message: opts.Message, Pause: !opts.NoPause,
		Arch: runtime.GOARCH, Now: time.Now().UTC(), Change: commit.Changes(opts.Changes, runtime.GOARCH),
	}
	if vm.Config.UsesImage() {
		image, err := m.images.Get(ctx, vm.Image)
		if err != nil {
			return smolvm.Image{}, err
		}
		origin, layers, err := m.catalog.Origin(image)
		switch {
		case err == nil:
			options.Base, options.Layers = &origin, layers
		case !errors.Is(err, smolvm.ErrImageNotFound):
			return smolvm.Image{}, err
		default:
			options.Config = image.Config
		}
	}
	if !vm.State.Alive() {
		if _, err := m.Start(ctx, id, smolvm.StartOptions{}); err != nil {
			return smolvm.Image{}, err
		}
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*smolvm.DefaultStopTimeout)
			defer cancel()
			_, stopErr := m.Stop(ctx, id, smolvm.StopOptions{})
			err = errors.Join(err, stopErr)
		}()
	}
	client, err := m.client(ctx, id, "make an image of")
	if err != nil {
		return smolvm.Image{}, err
	}
	stored, err := commit.Image(ctx, client, m.catalog.OCI, options)
	if err != nil {
		return smolvm.Image{}, err
	}
	step.Reached(ctx, "image commit/stored")
	return m.catalog.Boot(ctx, stored, opts.Progress)
}
