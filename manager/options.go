package manager

import (
	"fmt"
	"os"
	"runtime"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/budget"
	"github.com/smolvm/smolvm/internal/size"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// Config says how to open a [Manager]. The zero value is useful.
type Config struct {
	// DataDir holds the state database, disks, images, keys and logs. Empty:
	// $SMOLVM_DATA_DIR; else smolvm in the user's state directory
	// ($XDG_STATE_HOME, or ~/.local/state); else /var/lib/smolvm. The first of
	// the last two that can be written is taken.
	//
	// It must belong to the user that runs this, and nobody else may write to it. It can
	// be renamed, moved and copied while no VM of it runs: a copy is a data directory of
	// its own.
	DataDir string
	// Existing opens a data directory that is there already, and makes none; the error
	// matches [ErrNoDataDir] then.
	Existing bool
	// SocketDir holds the sockets of running VMs. Empty: smolvm in
	// $XDG_RUNTIME_DIR, or /tmp/smolvm-<uid>. It may be of any length: where a
	// socket's path would become too long for the kernel, the sockets are put
	// under /tmp/smolvm-<uid> instead.
	SocketDir string
	// Backend runs VMs that don't name one: a name that Backends lists, or "auto" for the
	// first of them that can run VMs on this host. Empty: $SMOLVM_BACKEND, else "auto".
	Backend string

	// ShimCommand is the program that becomes a VM's shim, with its arguments:
	// this module's own CLI with the argument "smolvm-shim". Empty: the program named
	// smolvm beside the running one, or in PATH.
	ShimCommand []string
	// Embedded makes this program the shim of its VMs, in the place of ShimCommand: the
	// smolvm program is not needed then. This program's main must begin with a call of
	// Main of this module's package shim, or no VM starts.
	Embedded bool
	// AgentPath is the smolvm-agent program, which goes into images. Empty: the
	// one built into this program, else the program named smolvm-agent beside
	// the running one, or in PATH.
	AgentPath string
	// Templates says what is kept to make the next start fast.
	Templates TemplateConfig
	// DiskBudget is how many bytes the data directory may take: when it takes more,
	// nothing is created, started, saved or built. Zero: $SMOLVM_DISK_BUDGET, a size such
	// as 20G; else no limit.
	DiskBudget int64
	// DiskReserve is how many bytes of the data directory's file system are to stay free:
	// with fewer, the same holds. Zero: $SMOLVM_DISK_RESERVE; else [DefaultDiskReserve], or
	// a twentieth of a small file system. Negative: none.
	DiskReserve int64
	// ImageBytes is how many bytes OCI images that were pulled may take together: a pull
	// removes those that were not used for longest, and that nothing is based on, until they
	// do. Images that were built, imported or tagged here stay. Zero: $SMOLVM_IMAGE_BUDGET, a
	// size such as 20G; else no limit.
	ImageBytes int64
	// MaxStarts is how many VMs of the data directory are started at once; further starts
	// wait for their turn. A start that takes longer than others do gives its turn up.
	// Zero: twice the number of CPUs.
	MaxStarts int

	// backends are those that are known; nil: those of package traits.
	backends traits.List
}

// TemplateConfig says how templates are kept. The zero value keeps them.
type TemplateConfig struct {
	// Disabled makes every start a cold boot, and makes no templates. So does "off"
	// in $SMOLVM_TEMPLATES.
	Disabled bool
	// MaxBytes is how much of the disk templates may take together; the least
	// recently used are removed. Zero: 4 GiB.
	MaxBytes int64
}

// DefaultDiskReserve is how many bytes of the data directory's file system stay free, unless
// that is small: then it is a twentieth of it.
const DefaultDiskReserve = budget.DefaultReserve

const templatesEnv = "SMOLVM_TEMPLATES"

func (c Config) templateBytes() int64 {
	if c.Templates.MaxBytes > 0 {
		return c.Templates.MaxBytes
	}
	return smolvm.DefaultTemplateBytes
}

const imageBudgetEnv = "SMOLVM_IMAGE_BUDGET"

func (c Config) imageBytes() (int64, error) {
	text := os.Getenv(imageBudgetEnv)
	if c.ImageBytes != 0 || text == "" {
		return c.ImageBytes, nil
	}
	mebibytes, err := size.ParseMebibytes(text)
	if err != nil {
		return 0, fmt.Errorf("$%s: %w", imageBudgetEnv, err)
	}
	return mebibytes << 20, nil
}

func (c Config) maxStarts() int {
	if c.MaxStarts > 0 {
		return c.MaxStarts
	}
	return 2 * runtime.NumCPU()
}

func (c Config) usesTemplates() bool {
	return !c.Templates.Disabled && os.Getenv(templatesEnv) != "off"
}
