package manager

import (
	"context"
	"fmt"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/template"
	"github.com/smolvm/smolvm/internal/vmm"
)

// BuildTemplate makes the template of VMs of some kind, and returns it. It need not be
// called: the first start of a kind has it made. If there is one it is returned.
func (m *Manager) BuildTemplate(ctx context.Context, opts smolvm.TemplateOptions) (smolvm.Template, error) {
	fail := func(err error) (smolvm.Template, error) {
		return smolvm.Template{}, fmt.Errorf("build template: %w", err)
	}
	config := smolvm.VMConfig{
		ID: smolvm.NewID(), Image: opts.Image, VCPUs: opts.VCPUs, MemoryMiB: opts.MemoryMiB,
		DiskSizeMiB: opts.DiskSizeMiB, WarmUp: opts.WarmUp, Network: kindOfNetwork(opts.Network),
	}.WithDefaults()
	kind, err := m.kindOf(ctx, config, opts.Progress)
	if err != nil {
		return fail(err)
	}
	lock, err := m.templates.Lock(ctx, kind)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = lock.Close() }()
	found, _, err := m.templates.Find(ctx, kind)
	if err == nil && opts.Force {
		m.templates.Drop(ctx, found.Name)
	}
	if err != nil || opts.Force {
		id, err := m.runTask(ctx, task{Template: &templateTask{Kind: kind, Config: config, Timeout: opts.Timeout}}, lock)
		if err == nil {
			found, _, err = m.templates.Open(id)
		}
		if err != nil {
			return fail(err)
		}
	}
	return m.templates.Info(found)
}

// kindOfNetwork returns the network of guests of a kind: what they have in common.
func kindOfNetwork(mode smolvm.NetworkMode) smolvm.Network {
	if mode == smolvm.NetworkBridge {
		mode = smolvm.NetworkTAP
	}
	return smolvm.Network{Mode: mode}
}

// kindOf returns the kind of the template for VMs of a configuration. It makes their image if
// that is missing, and is the default one.
func (m *Manager) kindOf(ctx context.Context, config smolvm.VMConfig, progress func(smolvm.Progress)) (template.Kind, error) {
	backend, _, err := m.check(&config)
	if err != nil {
		return template.Kind{}, err
	}
	if err := m.requireBackend(ctx, backend.Name); err != nil {
		return template.Kind{}, err
	}
	image, err := m.ensureImage(ctx, config.Image, "", progress)
	if err != nil {
		return template.Kind{}, err
	}
	args := config.BootArgs
	if args == "" {
		args = image.BootArgs
	}
	accelerator, err := m.accelerator(ctx, backend.Name)
	if err != nil {
		return template.Kind{}, err
	}
	at, err := network.Plan(config.Network.Mode, network.FirstIndex)
	if err != nil {
		return template.Kind{}, err
	}
	return m.templates.KindOf(config, image.Digest, backend.Name, vmm.Config{
		NIC:         machine.NICOf(at),
		Accelerator: accelerator, VCPUs: config.VCPUs, MemoryMiB: config.MemoryMiB,
		BootArgs: args, Drives: []vmm.Drive{{Format: backend.DiskFormats[0]}},
	})
}

// Templates lists the templates, the oldest first.
func (m *Manager) Templates(context.Context) ([]smolvm.Template, error) { return m.templates.List() }

// RemoveTemplate removes a template. VMs that were cloned from it go on. The error
// matches [smolvm.ErrTemplateNotFound].
func (m *Manager) RemoveTemplate(ctx context.Context, id string) error {
	return m.templates.Remove(ctx, id)
}

// PruneTemplates removes the templates that no VM will be cloned from any more, and of
// the rest the least recently used until they take at most as much as the options say. It
// returns the ids of those that it has removed.
func (m *Manager) PruneTemplates(ctx context.Context, opts smolvm.PruneTemplateOptions) ([]string, error) {
	maxBytes := opts.MaxBytes
	switch {
	case opts.All:
		maxBytes = 0
	case maxBytes <= 0:
		maxBytes = smolvm.DefaultTemplateBytes
	}
	return m.templates.Prune(ctx, maxBytes)
}
