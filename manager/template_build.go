package manager

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/snapshot"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/vmm"
)

// failurePrefix begins the names of files that say why a template could not be made.
const failurePrefix = ".failed-"

// failurePath is where the reason is kept for which the last template of a recipe could
// not be made, for the next start of this kind to tell: who makes one has nobody to tell.
func (m *Manager) failurePath(key string) string {
	return filepath.Join(m.dir.Templates(), failurePrefix+key)
}

// noteTemplate notes how the making of a template went.
func (m *Manager) noteTemplate(r recipe, err error) {
	if err == nil {
		_ = os.Remove(m.failurePath(r.key()))
		return
	}
	_ = os.WriteFile(m.failurePath(r.key()), []byte(err.Error()), 0o600)
}

// whyNoTemplate is why there is no template of a recipe, if that is not just because
// nobody has wanted one yet.
func (m *Manager) whyNoTemplate(r recipe) error {
	if text, err := os.ReadFile(m.failurePath(r.key())); err == nil && len(text) > 0 {
		return fmt.Errorf("template: it could not be made the last time: %s", text)
	}
	all, err := m.templates.List()
	if err != nil {
		return err
	}
	for _, one := range all {
		var meta templateMeta
		if json.Unmarshal(one.Meta, &meta) != nil || !m.stale(meta.Recipe) {
			continue
		}
		if meta.Recipe.withCurrentHost(r).key() == r.key() {
			return fmt.Errorf("template %s: the VMM, the host or smolvm is another one since it was made; a new one is made", one.Name)
		}
	}
	return nil
}

// templateMeta is what is kept with a template.
type templateMeta struct {
	Recipe recipe          `json:"recipe"`
	Config smolvm.VMConfig `json:"config"`
}

// buildTemplate makes a template, in a worker. The recipe's lock is held.
func (m *Manager) buildTemplate(ctx context.Context, r recipe, config smolvm.VMConfig) (id string, err error) {
	began := time.Now()
	if err := m.checkRoom(); err != nil {
		return "", err // the next start of its kind tries again
	}
	defer func() { m.noteTemplate(r, err) }()
	if err := m.templates.Clean(); err != nil {
		return "", err
	}
	random := make([]byte, (idDigits+1)/2)
	_, _ = rand.Read(random) // never fails: crypto/rand ends the program instead
	id = r.key() + "-" + hex.EncodeToString(random)[:idDigits]
	draft, err := m.templates.Draft(id)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, draft.Discard()) }()
	step.Reached(ctx, "template/draft")
	spec, err := m.templateSpec(ctx, r, config, draft)
	if err != nil {
		return "", err
	}
	program, err := m.shimCommand()
	if err != nil {
		return "", err
	}
	spec.Freeze = &shim.FreezeOrder{
		Commands: warmUp(config),
		Memory:   draft.Path(snapshot.MemoryFile),
		State:    draft.Path(snapshot.StateFile),
	}
	if err := shim.Freeze(ctx, shim.LaunchOptions{Program: program, Spec: spec, LogPath: m.workerLog()}); err != nil {
		return "", err
	}
	step.Reached(ctx, "template/frozen")
	unlock, err := m.disks.Lock(ctx)
	if err != nil {
		return "", err
	}
	err = m.disks.AddLayer(ctx, draft.Path(snapshot.DiskFile), id)
	unlock()
	if err != nil {
		return "", err
	}
	step.Reached(ctx, "template/layer")
	if _, err := draft.Commit(ctx, templateMeta{Recipe: r, Config: config}, m.bootID()); err != nil {
		return "", errors.Join(err, m.reclaimLayers(ctx))
	}
	step.Reached(ctx, "template/published")
	m.note(ctx, id, "template", began, "image "+r.Image)
	return id, m.pruneTemplates(ctx, m.config.templateBytes(), id)
}

// templateSpec is the VM that is to be frozen.
func (m *Manager) templateSpec(ctx context.Context, r recipe, config smolvm.VMConfig, draft *snapshot.Draft) (shim.Spec, error) {
	image, err := m.images.Get(ctx, r.Image)
	if err != nil {
		return shim.Spec{}, err
	}
	err = m.disks.Create(ctx, backing.Overlay{
		Path: draft.Path(snapshot.DiskFile), Base: rootfsOf(image, r.DiskSizeMiB), BaseFormat: disk.Raw, Size: r.DiskSizeMiB << 20,
	})
	if err != nil {
		return shim.Spec{}, err
	}
	drive, err := m.ownDrive(draft.Path(snapshot.DiskFile))
	if err != nil {
		return shim.Spec{}, err
	}
	return m.strangerSpec(shim.Spec{
		Backend: r.Hardware.Backend,
		VMM: vmm.Config{
			ID:          "template-" + r.key(),
			Accelerator: r.Hardware.Accelerator,
			VCPUs:       config.VCPUs,
			MemoryMiB:   config.MemoryMiB,
			Kernel:      image.KernelPath,
			Initrd:      image.InitrdPath,
			BootArgs:    r.BootArgs,
			Drives:      []vmm.Drive{drive},
			Channel:     true,
			ConsolePath: draft.Path("console.log"),
			LogPath:     draft.Path("vmm.log"),
		},
		ReadyTimeout: bootTimeout(smolvm.StartOptions{}, r.Hardware.Accelerator),
	})
}

// strangerSpec completes the spec of a VM that nobody has asked for yet: with the
// network and the identity of nobody.
func (m *Manager) strangerSpec(spec shim.Spec) (shim.Spec, error) {
	at, err := addresses(store.VM{Lease: network.PlaceholderIndex})
	if err != nil {
		return spec, err
	}
	hello, err := shim.PlaceholderIdentity(wireNetwork(at))
	if err != nil {
		return spec, err
	}
	spec.ID, spec.Run = spec.VMM.ID, newRun()
	spec.VMM.NIC = &vmm.NIC{MAC: at.MAC}
	attached := at.Config()
	spec.Network = &attached
	spec.Hello = &hello
	spec.Ready = smolvm.ReadyAgent
	return spec, nil
}

// warmUp is what the guest is to run before it is handed out.
func warmUp(config smolvm.VMConfig) [][]string {
	if config.WarmUp == "" {
		return nil
	}
	return [][]string{{"sh", "-c", config.WarmUp}}
}
