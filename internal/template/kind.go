package template

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/vmm"
)

// format changes whenever a template of the same kind would be another: when the guest is
// taken through other steps before it is frozen, or is saved in another way.
const format = 2

// keyDigits of a key begin a template's id; idDigits more are drawn at random.
const keyDigits, idDigits = 12, 6

// Kind is all that makes one template differ from another.
type Kind struct {
	Format   int              `json:"format"`
	Hardware machine.Hardware `json:"hardware"`
	// Image is a digest, over kernel, initramfs, agent and root file system.
	Image       string `json:"image"`
	BootArgs    string `json:"boot_args"`
	DiskSizeMiB int64  `json:"disk_size_mib"`
	WarmUp      string `json:"warm_up"`
}

// Key names all templates of a kind. The id of each begins with it.
func (k Kind) Key() string {
	text, err := json.Marshal(k)
	if err != nil {
		panic(err) // strings and numbers always encode
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])[:keyDigits]
}

// DiskFormat returns the format of the guest's disk, which is its only drive.
func (k Kind) DiskFormat() string {
	if len(k.Hardware.Drives) == 0 {
		return disk.QCOW2 // of no kind that was ever made
	}
	return k.Hardware.Drives[0].Format
}

// withCurrentHost returns k with what depends on the host replaced by what is so now.
func (k Kind) withCurrentHost(now Kind) Kind {
	k.Format = now.Format
	k.Hardware.Program, k.Hardware.CPU, k.Hardware.Layout = now.Hardware.Program, now.Hardware.CPU, now.Hardware.Layout
	return k
}

// KindOf returns the kind of the template that a VM could be cloned from. The error says what
// a template can't have: drives of the VM's own, or a guest that can't be given an identity.
func (t *Templates) KindOf(config smolvm.VMConfig, digest, backend string, runs vmm.Config) (Kind, error) {
	switch {
	case !config.UsesImage():
		return Kind{}, errors.New("it has a kernel of its own")
	case config.DiskMode != smolvm.DiskIsolated:
		return Kind{}, errors.New("it shares its disk")
	case len(config.Drives) > 0:
		return Kind{}, errors.New("it has drives of its own")
	case config.WarmUp != "" && config.Egress != nil:
		return Kind{}, errors.New("its warm-up is to run under its egress policy")
	}
	hardware, err := t.Machines.HardwareOf(backend, runs)
	if err != nil {
		return Kind{}, err
	}
	return Kind{
		Format:      format,
		Hardware:    hardware,
		Image:       digest,
		BootArgs:    runs.BootArgs,
		DiskSizeMiB: config.DiskSizeMiB,
		WarmUp:      config.WarmUp,
	}, nil
}

// stale reports whether no start can be a clone of a kind's template any more, because
// the host or the program has changed.
func (t *Templates) stale(k Kind) bool {
	now, err := t.Machines.HardwareOf(k.Hardware.Backend, vmm.Config{Accelerator: k.Hardware.Accelerator})
	return err != nil || k.Key() != k.withCurrentHost(Kind{Format: format, Hardware: now}).Key()
}
