package manager

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/snapshot"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/vmm"
)

const (
	// templateFormat changes whenever a template of the same recipe would be another:
	// when the guest is taken through other steps before it is frozen, or is saved in
	// another way.
	templateFormat = 2
	// templateLease is an index that no VM gets; see package network.
	templateLease = network.FirstIndex - 1
	// keyDigits of a key begin a template's id; the rest of the id is drawn at random.
	keyDigits, idDigits = 12, 6
)

// hardware is what a saved guest needs to find again to go on.
type hardware struct {
	Backend     string `json:"backend"`
	Accelerator string `json:"accelerator"`
	// Program is the VMM's, with what changes when it is upgraded.
	Program string `json:"program"`
	// Layout of the devices; see [vmm.Traits].
	Layout    int         `json:"layout"`
	CPU       string      `json:"cpu"`
	VCPUs     int         `json:"vcpus"`
	MemoryMiB int         `json:"memory_mib"`
	Drives    []driveKind `json:"drives"`
}

type driveKind struct {
	Format   string `json:"format"`
	ReadOnly bool   `json:"read_only"`
}

// recipe is all that makes one template differ from another.
type recipe struct {
	Format   int      `json:"format"`
	Hardware hardware `json:"hardware"`
	// Image is a digest, over kernel, initramfs, agent and root file system.
	Image       string `json:"image"`
	BootArgs    string `json:"boot_args"`
	DiskSizeMiB int64  `json:"disk_size_mib"`
	WarmUp      string `json:"warm_up"`
}

// key names all templates of a recipe. The id of each begins with it.
func (r recipe) key() string {
	text, err := json.Marshal(r)
	if err != nil {
		panic(err) // strings and numbers always encode
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])[:keyDigits]
}

// withCurrentHost returns r with what depends on the host replaced by what is so now.
func (r recipe) withCurrentHost(now recipe) recipe {
	r.Format = now.Format
	r.Hardware.Program, r.Hardware.CPU, r.Hardware.Layout = now.Hardware.Program, now.Hardware.CPU, now.Hardware.Layout
	return r
}

// hardwareOf is the hardware of a VM that is run as config says.
func (m *Manager) hardwareOf(backend string, config vmm.Config) (hardware, error) {
	traits, err := vmm.Lookup(backend)
	if err != nil {
		return hardware{}, err
	}
	program, err := programStamp(traits)
	if err != nil {
		return hardware{}, err
	}
	h := hardware{
		Backend:     backend,
		Accelerator: config.Accelerator,
		Program:     program,
		Layout:      traits.Layout,
		CPU:         m.host.CPUModel(),
		VCPUs:       config.VCPUs,
		MemoryMiB:   config.MemoryMiB,
	}
	for _, drive := range config.Drives {
		h.Drives = append(h.Drives, driveKind{drive.Format, drive.ReadOnly})
	}
	return h, nil
}

// programStamp tells one build of a VMM from another without running it.
func programStamp(traits vmm.Traits) (string, error) {
	for _, name := range traits.Programs[0].Names {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return "", err
		}
		info, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%s %d %d", path, info.Size(), info.ModTime().UnixNano()), nil
	}
	return "", fmt.Errorf("%s is not installed", strings.Join(traits.Programs[0].Names, " or "))
}

// recipeOf is the recipe of the template that a VM could be cloned from. What a
// template can't have it says in words: drives of the VM's own, or a guest that can't
// be given an identity.
func (m *Manager) recipeOf(config smolvm.VMConfig, digest, backend string, machine vmm.Config) (recipe, error) {
	switch {
	case !config.UsesImage():
		return recipe{}, errors.New("it has a kernel of its own")
	case config.DiskMode != smolvm.DiskIsolated:
		return recipe{}, errors.New("it shares its disk")
	case len(config.Drives) > 0:
		return recipe{}, errors.New("it has drives of its own")
	}
	h, err := m.hardwareOf(backend, machine)
	if err != nil {
		return recipe{}, err
	}
	return recipe{
		Format:      templateFormat,
		Hardware:    h,
		Image:       digest,
		BootArgs:    machine.BootArgs,
		DiskSizeMiB: config.DiskSizeMiB,
		WarmUp:      config.WarmUp,
	}, nil
}

// findTemplate returns the template of a recipe, and verifies it. What is damaged is
// removed.
func (m *Manager) findTemplate(ctx context.Context, r recipe) (found snapshot.Snapshot, warnings []string, err error) {
	paths, err := glob.In(m.dir.Templates(), r.key()+"-*")
	if err != nil {
		return found, nil, err
	}
	for _, path := range paths {
		template, err := m.templates.Get(filepath.Base(path))
		if err == nil {
			err = m.templates.Verify(ctx, template, m.bootID())
		}
		if ctx.Err() != nil {
			return found, warnings, context.Cause(ctx)
		}
		if err == nil {
			return template, warnings, nil
		}
		warnings = append(warnings, "template: "+err.Error())
		m.dropTemplate(ctx, filepath.Base(path))
	}
	return found, warnings, fmt.Errorf("template of kind %s: %w", r.key(), smolvm.ErrTemplateNotFound)
}

// dropTemplate removes a template that is of no use. VMs that were cloned from it go
// on: they have its memory mapped, and its disk is a layer.
func (m *Manager) dropTemplate(ctx context.Context, id string) {
	_ = os.RemoveAll(filepath.Join(m.dir.Templates(), id))
	_ = m.reclaimLayers(ctx)
}

// templateLock is held by whoever makes the templates of a recipe.
func (m *Manager) templateLock(r recipe) (*os.File, error) {
	return os.OpenFile(filepath.Join(m.dir.Templates(), ".lock-"+r.key()), os.O_CREATE|os.O_RDWR, 0o600)
}

// awaitTemplate returns the template of a recipe, and waits for one that is just being
// made: it has been begun earlier than a cold boot that began now. If there is none, and
// nobody makes one, it returns the lock under which one is to be made.
func (m *Manager) awaitTemplate(ctx context.Context, r recipe) (found snapshot.Snapshot, lock *os.File, warnings []string, err error) {
	found, warnings, err = m.findTemplate(ctx, r)
	if !errors.Is(err, smolvm.ErrTemplateNotFound) {
		return found, nil, warnings, err
	}
	if lock, err = m.templateLock(r); err != nil {
		return found, nil, warnings, err
	}
	if flock.TryLock(lock) == nil {
		// It may have been made since we looked.
		if again, _, err := m.findTemplate(ctx, r); err == nil {
			return again, nil, warnings, lock.Close()
		}
		return found, lock, warnings, fmt.Errorf("template of kind %s: %w", r.key(), smolvm.ErrTemplateNotFound)
	}
	if err := flock.Lock(ctx, lock); err != nil {
		return found, nil, warnings, err
	}
	_ = lock.Close()
	found, more, err := m.findTemplate(ctx, r)
	return found, nil, append(warnings, more...), err
}

// BuildTemplate makes the template of VMs of some kind, and returns it. It need not be
// called: the first start of a kind has it made. If there is one it is returned.
func (m *Manager) BuildTemplate(ctx context.Context, opts smolvm.TemplateOptions) (smolvm.Template, error) {
	config := smolvm.VMConfig{
		ID: smolvm.NewID(), Image: opts.Image, VCPUs: opts.VCPUs, MemoryMiB: opts.MemoryMiB,
		DiskSizeMiB: opts.DiskSizeMiB, WarmUp: opts.WarmUp,
	}.WithDefaults()
	r, err := m.recipeFor(ctx, config, opts.Progress)
	if err != nil {
		return smolvm.Template{}, fmt.Errorf("build template: %w", err)
	}
	lock, err := m.templateLock(r)
	if err == nil {
		err = flock.Lock(ctx, lock)
	}
	if err != nil {
		return smolvm.Template{}, fmt.Errorf("build template: %w", err)
	}
	defer func() { _ = lock.Close() }()
	found, _, err := m.findTemplate(ctx, r)
	if err == nil && opts.Force {
		m.dropTemplate(ctx, found.Name)
	}
	if err != nil || opts.Force {
		id, err := m.runTask(ctx, task{Template: &templateTask{Recipe: r, Config: config}}, lock)
		if err == nil {
			found, err = m.templates.Get(id)
		}
		if err != nil {
			return smolvm.Template{}, fmt.Errorf("build template: %w", err)
		}
	}
	return m.templateInfo(found)
}

// recipeFor is the recipe of the template for VMs of a configuration.
func (m *Manager) recipeFor(ctx context.Context, config smolvm.VMConfig, progress func(smolvm.Progress)) (recipe, error) {
	backend, _, err := m.check(&config)
	if err != nil {
		return recipe{}, err
	}
	if err := m.requireBackend(ctx, backend.Name); err != nil {
		return recipe{}, err
	}
	image, err := m.ensureImage(ctx, config.Image, progress)
	if err != nil {
		return recipe{}, err
	}
	args := config.BootArgs
	if args == "" {
		args = image.BootArgs
	}
	return m.recipeOf(config, image.Digest, backend.Name, vmm.Config{
		Accelerator: m.host.Accelerator(ctx).Name, VCPUs: config.VCPUs, MemoryMiB: config.MemoryMiB,
		BootArgs: args, Drives: []vmm.Drive{{Format: disk.QCOW2}},
	})
}

// Templates lists the templates, the oldest first.
func (m *Manager) Templates(context.Context) ([]smolvm.Template, error) {
	all, err := m.templates.List()
	if err != nil {
		return nil, err
	}
	templates := make([]smolvm.Template, 0, len(all))
	for _, one := range all {
		if info, err := m.templateInfo(one); err == nil {
			templates = append(templates, info)
		}
	}
	return templates, nil
}

func (m *Manager) templateInfo(found snapshot.Snapshot) (smolvm.Template, error) {
	var meta templateMeta
	if err := json.Unmarshal(found.Meta, &meta); err != nil {
		return smolvm.Template{}, fmt.Errorf("template %s: %w", found.Name, err)
	}
	r := meta.Recipe
	return smolvm.Template{
		ID: found.Name, Image: r.Image, VCPUs: r.Hardware.VCPUs, MemoryMiB: r.Hardware.MemoryMiB,
		DiskSizeMiB: r.DiskSizeMiB, WarmUp: r.WarmUp, Backend: r.Hardware.Backend, Accelerator: r.Hardware.Accelerator,
		Stale: m.stale(r), Size: found.Size, CreatedAt: found.CreatedAt, UsedAt: found.UsedAt,
	}, nil
}

// stale reports whether no start can be a clone of a recipe's template any more, because
// the host or the program has changed.
func (m *Manager) stale(r recipe) bool {
	now, err := m.hardwareOf(r.Hardware.Backend, vmm.Config{Accelerator: r.Hardware.Accelerator})
	return err != nil || r.key() != r.withCurrentHost(recipe{Format: templateFormat, Hardware: now}).key()
}

// RemoveTemplate removes a template. VMs that were cloned from it go on. The error
// matches [smolvm.ErrTemplateNotFound].
func (m *Manager) RemoveTemplate(ctx context.Context, id string) error {
	err := m.templates.Remove(id)
	if errors.Is(err, smolvm.ErrNotFound) {
		return &smolvm.Error{Hint: "`smolvm template ls` lists the templates", Err: fmt.Errorf("%w: %q", smolvm.ErrTemplateNotFound, id)}
	}
	step.Reached(ctx, "template rm/removed")
	return errors.Join(err, m.reclaimLayers(ctx))
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
	removed := []string{}
	all, err := m.Templates(ctx)
	if err != nil {
		return removed, err
	}
	var errs []error
	drop := func(id string) {
		if err := m.RemoveTemplate(ctx, id); err != nil {
			errs = append(errs, err)
			return
		}
		removed = append(removed, id)
	}
	slices.SortFunc(all, func(a, b smolvm.Template) int { return b.UsedAt.Compare(a.UsedAt) })
	var size int64
	for _, template := range all {
		if size += template.Size; template.Stale || size > maxBytes {
			size -= template.Size
			drop(template.ID)
		}
	}
	errs = append(errs, removeAll(m.dir.Templates(), failurePrefix+"*"), m.templates.Clean())
	return removed, errors.Join(errs...)
}

// pruneTemplates is PruneTemplates that spares the one that was just made.
func (m *Manager) pruneTemplates(ctx context.Context, maxBytes int64, spare string) error {
	if found, err := m.templates.Get(spare); err == nil {
		m.templates.Used(found)
		maxBytes = max(maxBytes, found.Size)
	}
	_, err := m.PruneTemplates(ctx, smolvm.PruneTemplateOptions{MaxBytes: maxBytes})
	return err
}
