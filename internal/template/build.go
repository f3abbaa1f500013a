package template

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/snapshot"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/vmm"
)

// failurePrefix begins the names of files that say why a template could not be made.
const failurePrefix = ".failed-"

// failurePath is where the reason is kept for which the last template of a kind could
// not be made, for the next start of this kind to tell: who makes one has nobody to tell.
func (t *Templates) failurePath(key string) string {
	return filepath.Join(t.Dir.Templates(), failurePrefix+key)
}

// noteResult notes how the making of a template went.
func (t *Templates) noteResult(k Kind, err error) {
	if err == nil {
		_ = os.Remove(t.failurePath(k.Key()))
		return
	}
	_ = os.WriteFile(t.failurePath(k.Key()), []byte(err.Error()), 0o600)
}

// WhyNone returns why there is no template of a kind; nil if nobody has wanted one yet.
func (t *Templates) WhyNone(k Kind) error {
	if text, err := os.ReadFile(t.failurePath(k.Key())); err == nil && len(text) > 0 {
		return fmt.Errorf("template: it could not be made the last time: %s", text)
	}
	all, err := t.Saved.List()
	if err != nil {
		return err
	}
	for _, one := range all {
		was, err := kindIn(one)
		if err != nil || !t.stale(was) {
			continue
		}
		if was.withCurrentHost(k).Key() == k.Key() {
			return fmt.Errorf("template %s: the VMM, the host or smolvm is another one since it was made; a new one is made", one.Name)
		}
	}
	return nil
}

// Build makes the template of a kind from a VM of a configuration, in a worker, and returns
// its id. The kind's lock is held. The VM may take so long to be ready; zero: as long as others.
func (t *Templates) Build(ctx context.Context, k Kind, config smolvm.VMConfig, timeout time.Duration) (id string, err error) {
	began := time.Now()
	if err := t.Budget.Check(); err != nil {
		return "", err // the next start of its kind tries again
	}
	defer func() { t.noteResult(k, err) }()
	if err := t.Saved.Clean(); err != nil {
		return "", err
	}
	random := make([]byte, (idDigits+1)/2)
	_, _ = rand.Read(random) // never fails: crypto/rand ends the program instead
	id = k.Key() + "-" + hex.EncodeToString(random)[:idDigits]
	draft, err := t.Saved.Draft(id)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, draft.Discard()) }()
	step.Reached(ctx, "template/draft")
	if err := t.freeze(ctx, k, config, timeout, draft); err != nil {
		return "", err
	}
	step.Reached(ctx, "template/frozen")
	unlock, err := t.Disks.Lock(ctx)
	if err != nil {
		return "", err
	}
	err = t.Disks.AddLayer(ctx, draft.Path(draft.Disk), id)
	unlock()
	if err != nil {
		return "", err
	}
	step.Reached(ctx, "template/layer")
	if _, err := draft.Commit(ctx, meta{Kind: k, Config: config}, t.HostBootID()); err != nil {
		return "", errors.Join(err, t.Disks.Collect(ctx))
	}
	step.Reached(ctx, "template/published")
	t.Note(ctx, id, "template", began, "image "+k.Image)
	return id, t.pruneOthers(ctx, id)
}

// pruneOthers is Prune that spares the template that was just made.
func (t *Templates) pruneOthers(ctx context.Context, spare string) error {
	maxBytes := t.MaxBytes
	if found, err := t.Saved.Get(spare); err == nil {
		t.Saved.Used(found)
		maxBytes = max(maxBytes, found.Size)
	}
	_, err := t.Prune(ctx, maxBytes)
	return err
}

// freeze boots a VM of a kind, and saves it into a draft.
func (t *Templates) freeze(ctx context.Context, k Kind, config smolvm.VMConfig, timeout time.Duration, draft *snapshot.Draft) error {
	spec, err := t.spec(ctx, k, config, draft)
	if err != nil {
		return err
	}
	spec.ReadyTimeout = cmp.Or(timeout, spec.ReadyTimeout)
	program, err := t.Program()
	if err != nil {
		return err
	}
	spec.Freeze = &shim.FreezeOrder{
		Commands: warmUp(config),
		Memory:   draft.Path(snapshot.MemoryFile),
		State:    draft.Path(snapshot.StateFile),
	}
	return shim.Freeze(ctx, shim.LaunchOptions{Program: program, Spec: spec, LogPath: t.LogPath})
}

// spec returns what the shim of the VM that is to be frozen is told.
func (t *Templates) spec(ctx context.Context, k Kind, config smolvm.VMConfig, draft *snapshot.Draft) (shim.Spec, error) {
	image, err := t.Machines.Images.Get(ctx, k.Image)
	if err != nil {
		return shim.Spec{}, err
	}
	draft.Disk = snapshot.DiskFile(k.DiskFormat())
	err = t.Disks.Create(ctx, backing.Disk{
		Path: draft.Path(draft.Disk), Base: machine.Rootfs(image, k.DiskSizeMiB), BaseFormat: disk.Raw, Size: k.DiskSizeMiB << 20,
	})
	if err != nil {
		return shim.Spec{}, err
	}
	drive, err := t.Machines.Own(draft.Path(draft.Disk))
	if err != nil {
		return shim.Spec{}, err
	}
	return shim.Placeholder(shim.Spec{
		Backend: k.Hardware.Backend,
		VMM: vmm.Config{
			ID:          "template-" + k.Key(),
			Accelerator: k.Hardware.Accelerator,
			VCPUs:       config.VCPUs,
			MemoryMiB:   config.MemoryMiB,
			Nested:      k.Hardware.Nested,
			Kernel:      image.KernelPath,
			Initrd:      image.InitrdPath,
			BootArgs:    k.BootArgs,
			Drives:      []vmm.Drive{drive},
			Channel:     true,
			ConsolePath: draft.Path("console.log"),
			LogPath:     draft.Path(machine.VMMLog),
			WorkDir:     draft.Path(""),
		},
		ReadyTimeout: t.Machines.BootTimeout(ctx, k.Hardware.Accelerator),
		Origin:       shim.Origin{DataDir: t.Dir.Root()},
	}, k.Hardware.NIC.Mode(), t.Machines.MTU(k.Hardware.Backend, k.Hardware.NIC.Mode()))
}

// warmUp returns what the guest is to run before it is frozen.
func warmUp(config smolvm.VMConfig) [][]string {
	if config.WarmUp == "" {
		return nil
	}
	return [][]string{{"sh", "-c", config.WarmUp}}
}
