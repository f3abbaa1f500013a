package manager

import (
	"os"
	"runtime"
	"time"

	"github.com/smolvm/smolvm"
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
	// Backend runs VMs that don't name one: "qemu" or "auto". Empty:
	// $SMOLVM_BACKEND, else "auto".
	Backend string

	// ShimCommand is the program that becomes a VM's shim, with its arguments:
	// this module's own CLI with the argument "shim". Empty: the program named
	// smolvm beside the running one, or in PATH.
	ShimCommand []string
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
	// Pool, if its Size is not zero, keeps VMs ready as [Manager.SetPool] does. It is
	// filled in the background, and lasts until [Manager.RemovePool].
	Pool PoolOptions
	// MaxStarts is how many VMs of the data directory are started at once; further starts
	// wait for their turn. A start that takes longer than others do gives its turn up.
	// Zero: twice the number of CPUs.
	MaxStarts int
	// Progress is told how the building of an image goes on; it may be nil.
	Progress func(Progress)
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

// DefaultTemplateBytes is what templates may take on disk: that is about 40 of the
// usual size.
const DefaultTemplateBytes = 4 << 30

const templatesEnv = "SMOLVM_TEMPLATES"

func (c Config) templateBytes() int64 {
	if c.Templates.MaxBytes > 0 {
		return c.Templates.MaxBytes
	}
	return DefaultTemplateBytes
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

// Progress is one step of a long operation.
type Progress struct {
	// Phase says what is being done, as in "download kernel".
	Phase string
	// Done and Total count bytes; Total is zero where it is not known, and both
	// are where there is nothing to count.
	Done, Total int64
}

// StartOptions are the options of [Manager.Start].
type StartOptions struct {
	// Timeout for the guest to become ready. Zero: 30 s with hardware
	// virtualization, four times as long without.
	Timeout time.Duration
	// Cold boots the guest from the beginning, and has no template made.
	Cold bool
}

// DefaultBootTimeout is how long a guest may take to become ready under hardware
// virtualization, as in Python's SmolVM.
const DefaultBootTimeout = 30 * time.Second

// StopOptions are the options of [Manager.Stop].
type StopOptions struct {
	// Timeout for an orderly shutdown; after that the VM is ended the hard way.
	// Zero: 10 s, but no more than about a second for a guest that does not listen:
	// one without an agent that shows no sign of having noticed its power button.
	// Negative: at once.
	Timeout time.Duration
}

// DeleteOptions are the options of [Manager.DeleteWith].
type DeleteOptions struct {
	// Timeout for an orderly shutdown of a VM that runs. Zero: it is ended at once,
	// unless its disk is to be retained.
	Timeout time.Duration
}

// DefaultStopTimeout is how long a guest may take to shut down, as in Python's
// SmolVM.
const DefaultStopTimeout = 10 * time.Second

// ListOptions are the options of [Manager.List]. A VM is listed if it meets all of
// them; the zero value lists all VMs.
type ListOptions struct {
	// IDs are ids of VMs, or patterns of them as in [path.Match]: "web-*". A VM meets
	// one of them. Ids of no VM are no error.
	IDs []string
	// State is the VM's state. Empty: any.
	State smolvm.VMState
	// Image is the name under which the VM was created, the digest of its image, or
	// the beginning of that. Empty: any image or none.
	Image string
	// Labels are labels that the VM has, with these values.
	Labels map[string]string
}

// LogOptions are the options of [Manager.Logs].
type LogOptions struct {
	// Tail starts so many lines before the end. Zero: at the beginning.
	Tail int
	// Follow goes on as the guest writes, until the VM ends.
	Follow bool
}

// SSHOptions are the options of [Manager.SSHCommands].
type SSHOptions struct {
	// User to log in as. Empty: root.
	User string
	// KeyPath is the private key; a leading ~ is expanded. Empty: the data
	// directory's own key.
	KeyPath string
	// PublicHost is a name or address under which other hosts reach this one.
	PublicHost string
}

// SSHCommands are ready-to-run shell commands. A command that can't work for the
// VM is empty.
type SSHCommands struct {
	// PrivateIP connects to the guest's own address. It is empty for a VM with
	// rootless networking, whose address exists only within its shim.
	PrivateIP string `json:"private_ip,omitempty"`
	// LocalhostPort connects by the forwarded port on this host.
	LocalhostPort string `json:"localhost_port,omitempty"`
	// Public connects by the forwarded port from another host. It needs
	// PublicHost, and a VM whose SSHHostAddr is reachable from there.
	Public string `json:"public,omitempty"`
}

// BuildOptions are the options of [Manager.BuildImage].
type BuildOptions struct {
	// Name of the image. Empty: "base".
	Name string
	// Kernel is a kernel as ELF or bzImage. Empty: the distribution's.
	Kernel string
	// ModulesDir is the kernel's tree of modules, as under /lib/modules. It
	// belongs to Kernel; empty: all that is needed is built into the kernel.
	ModulesDir string
	// Rootfs is an ext4 image or a directory. Empty: a small busybox system.
	Rootfs string
	// Force builds even if an image of the same recipe is there.
	Force bool
}
