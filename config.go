package smolvm

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Limits and defaults of a [VMConfig]; the same as those of Python's SmolVM.
const (
	DefaultVCPUs     = 2
	MinVCPUs         = 1
	MaxVCPUs         = 32
	DefaultMemoryMiB = 512
	MinMemoryMiB     = 128
	MaxMemoryMiB     = 16384
	MaxIDLength      = 64
	// MaxLabels is how many labels a VM may have; MaxLabelName and MaxLabelValue are
	// their lengths in bytes.
	MaxLabels     = 64
	MaxLabelName  = 63
	MaxLabelValue = 256
	// MinCPULimit is the kernel's own limit: 1 ms in 100 ms.
	MinCPULimit = 0.01
	MaxCPULimit = 1024
	// MinDiskBytesPerSecond and MinDiskIOPS leave a guest so much of its disks that it starts
	// in time; MaxDiskRate, of both, is more than any disk does.
	MinDiskBytesPerSecond = 64 << 10
	MinDiskIOPS           = 10
	MaxDiskRate           = 1 << 40
	// DefaultBootArgs are the kernel arguments of a VM that is made from paths
	// and names none.
	DefaultBootArgs = "console=ttyS0 reboot=k panic=1 pci=off"
	// InitAuto as a VM's Init stands for the init that its image says.
	InitAuto = "auto"
	// DefaultImage is used by a VM that names neither an image nor a kernel.
	DefaultImage = "base"
	// MaxDiskSizeMiB is 16 TiB, ext4's own limit with 4 KiB blocks.
	MaxDiskSizeMiB = 16 << 20
)

// DiskMode says what a VM does with its root file system.
type DiskMode string

const (
	// DiskIsolated gives the VM a disk of its own over the root file system,
	// which stays as it is. It is the default.
	DiskIsolated DiskMode = "isolated"
	// DiskShared lets the VM write to the root file system itself. At most one
	// running VM may do that at a time.
	DiskShared DiskMode = "shared"
)

// DiskFormat is the format of a disk image.
type DiskFormat string

// The formats of disk images.
const (
	FormatRaw   DiskFormat = "raw"
	FormatQCOW2 DiskFormat = "qcow2"
)

func (f DiskFormat) problem() string {
	switch f {
	case "", FormatRaw, FormatQCOW2:
		return ""
	}
	return fmt.Sprintf("%q is not known; use %s or %s", f, FormatRaw, FormatQCOW2)
}

// ReadyCondition says when a started VM counts as running.
type ReadyCondition string

const (
	// ReadyAgent waits until the agent in the guest answers. It is the default
	// for a VM made from an image.
	ReadyAgent ReadyCondition = "agent"
	// ReadySSH waits until something in the guest answers as an SSH server on
	// port 22.
	ReadySSH ReadyCondition = "ssh"
	// ReadyStarted waits for the VMM only. It is the default for a VM made from
	// a kernel and a root file system of the caller's own.
	ReadyStarted ReadyCondition = "started"
)

// VMConfig says what a VM is to be. The zero value asks for a VM of the default
// image with all the defaults.
type VMConfig struct {
	// ID names the VM: lower-case letters and digits, with '-' and '_' inside, at
	// most 64. Empty: Create makes one up.
	ID string `json:"id,omitempty"`
	// Labels are names and values of the caller's own, to find VMs by; see
	// [ValidateLabel]. A fork or a restored VM has those of its origin.
	Labels map[string]string `json:"labels,omitempty"`
	// VCPUs is the number of virtual CPUs, 1 to 32. Zero: 2.
	VCPUs int `json:"vcpus"`
	// MemoryMiB is the guest's memory, 128 to 16384 MiB. Zero: 512.
	MemoryMiB int `json:"memory_mib"`

	// CPULimit is how many of the host's processors' time the VM may take, as in 0.5,
	// however many virtual CPUs it has. Zero: as much as there is. A host whose control
	// groups can't be used can't limit that, and does not start the VM.
	CPULimit float64 `json:"cpu_limit,omitempty"`

	// DiskBytesPerSecond is how many bytes the VM may read and write in a second, on all its
	// disks and drives together, and DiskIOPS how many reads and writes it may make. They are
	// held to from one tenth of a second to the next. Zero: as many as the host makes of them.
	// The VMM sees to it, so every host can.
	DiskBytesPerSecond int64 `json:"disk_bytes_per_second,omitempty"`
	DiskIOPS           int64 `json:"disk_iops,omitempty"`

	// NestedVirtualization gives the guest a CPU by which it can run VMs itself: emulated, AMD's
	// SVM; on KVM, what the host's KVM passes on. It takes a kernel with KVM in the guest, as
	// a module or built in. A VM that can't have it here does not start; see
	// [ErrUnsupported].
	NestedVirtualization bool `json:"nested_virtualization,omitempty"`

	// Image is the name or digest of the image to boot. Empty: "base", unless
	// KernelPath is given. It excludes KernelPath, InitrdPath and RootfsPath.
	Image string `json:"image,omitempty"`
	// KernelPath is a Linux kernel, as ELF or bzImage, that is booted as it is:
	// without smolvm's initramfs, and so without its agent.
	KernelPath string `json:"kernel_path,omitempty"`
	// InitrdPath is an initramfs for KernelPath.
	InitrdPath string `json:"initrd_path,omitempty"`
	// RootfsPath is a raw or qcow2 disk image for KernelPath; the guest sees it
	// as /dev/vda.
	RootfsPath string `json:"rootfs_path,omitempty"`
	// RootfsFormat of RootfsPath, and RootfsBacking that it is based on, as in [Drive].
	RootfsFormat  DiskFormat `json:"rootfs_format,omitempty"`
	RootfsBacking []DiskFile `json:"rootfs_backing,omitempty"`
	// BootArgs are the kernel's arguments. Empty: those of the image, or
	// [DefaultBootArgs].
	BootArgs string `json:"boot_args,omitempty"`

	// Backend runs the VM: a name that [Hosts]' Backends lists, or "auto" for the first of
	// them that can run VMs on the host. Empty: the Manager's.
	Backend string `json:"backend,omitempty"`

	// DiskMode is "isolated" (the default) or "shared".
	DiskMode DiskMode `json:"disk_mode,omitempty"`
	// DiskSizeMiB is the size of the VM's own disk. Zero: as large as the root
	// file system it is made from. It can't be smaller than that; but an image that was
	// built from a directory has a small one too, for disks of less than 8 GiB.
	DiskSizeMiB int64 `json:"disk_size_mib,omitempty"`
	// RetainDisk keeps the VM's own disk when the VM is deleted. A VM that is
	// later created with the same id goes on with it.
	RetainDisk bool `json:"retain_disk,omitempty"`
	// Drives are further disks; the guest sees them as /dev/vdb, /dev/vdc, ...
	Drives []Drive `json:"drives,omitempty"`

	// Mounts are directories of the host.
	Mounts []Mount `json:"mounts,omitempty"`

	// Network is how the VM is connected.
	Network Network `json:"network,omitzero"`
	// PortForwards are set up at every start. More can be added to a running VM.
	PortForwards []PortForward `json:"port_forwards,omitempty"`
	// SSHHostAddr is the host address on which the guest's SSH port is offered.
	// Zero: 127.0.0.1. Use 0.0.0.0 to reach the VM from other hosts. There is no such port in
	// network modes bridge and none.
	SSHHostAddr netip.Addr `json:"ssh_host_addr,omitzero"`
	// Egress is what the guest may reach. Nil: all but what is closed always. It can be changed
	// while the VM runs; see [Egress].
	Egress *EgressPolicy `json:"egress,omitempty"`
	// Secrets are values that the guest's programs use without having them. They need an
	// egress policy that denies by default and allows each of their hosts.
	Secrets []Secret `json:"secrets,omitempty"`
	// AuthorizedKeys are public keys, in OpenSSH's format, that may log in
	// besides the data directory's own key.
	AuthorizedKeys []string `json:"authorized_keys,omitempty"`

	// Env is added to the environment of every command, and wins over the image's of the same
	// name. Of a VM that was created it has the image's too.
	Env map[string]string `json:"env,omitempty"`
	// WorkingDir is the directory of commands that name none: an absolute path. Empty: the
	// image's; for an image without a configuration, the user's home directory.
	WorkingDir string `json:"working_dir,omitempty"`
	// User runs the commands that name none, as in [Command]. Empty: the image's, else root.
	User string `json:"user,omitempty"`
	// Entrypoint and Cmd are what [Run] runs, one after the other; the arguments of a command
	// that it is given take the place of Cmd. Empty: the image's. An Entrypoint replaces the
	// image's Cmd too, and one of a single empty text takes both away.
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	// StopSignal is what processes get when the VM is shut down by a stop: a name or a number,
	// as in "SIGQUIT". Empty: the image's, else SIGTERM, and SIGHUP for shells.
	StopSignal string `json:"stop_signal,omitempty"`
	// Healthcheck is how to find out whether what runs in the VM works; see [VMInfo].Health. What
	// is empty or zero in it is the image's, else 30 s for Interval and Timeout, none for
	// StartPeriod, 5 s for StartInterval, and 3 for Retries. Nil: the image's, if it has one.
	Healthcheck *Healthcheck `json:"healthcheck,omitempty"`
	// NoHealthcheck makes no checks, whatever the image says.
	NoHealthcheck bool `json:"no_healthcheck,omitempty"`
	// PublishAll forwards a free port of the host to each port that the image exposes and that
	// PortForwards has not; see [Ports] for those that were chosen.
	PublishAll bool `json:"publish_all,omitempty"`
	// Init is the image's own init, an absolute path such as /sbin/init, which is run as the
	// guest's first process, and beside it the agent. [InitAuto]: the image's Entrypoint or
	// Cmd if that is an absolute path, else /sbin/init. Empty: the agent is the first process.
	Init string `json:"init,omitempty"`
	// Hostname of the guest. Empty: the VM's id, with '-' for each '_', which host
	// names may not have.
	Hostname string `json:"hostname,omitempty"`
	// WarmUp is a line of shell that the guest runs, as root, before it is handed out
	// for the first time. It runs once, before the VM becomes a template, and clones
	// start with its effects: an interpreter that it has started is running in each of
	// them, and what it has read is in memory.
	// Its environment is not that of Env, which belongs to one VM.
	WarmUp string `json:"warm_up,omitempty"`
	// Ready says when Start may return.
	Ready ReadyCondition `json:"ready,omitempty"`
	// TTL stops the VM when it has run for so long. Zero: never.
	TTL time.Duration `json:"-"` // "ttl_ms"
	// Ephemeral deletes the VM as soon as it stops, and stops it when the
	// process that started it ends.
	Ephemeral bool `json:"ephemeral,omitempty"`
}

// Drive is a further disk of a VM.
type Drive struct {
	// Path of a raw or qcow2 image on the host.
	Path string `json:"path"`
	// Format of the image. It is decided when the VM is created, and for good: what the
	// image holds later may have been written by a guest. Empty: raw; but an image that
	// looks like qcow2 is refused then. So is a qcow2 image that is based on a file which is
	// not in Backing, keeps its data in another file, is encrypted or has snapshots in it.
	Format DiskFormat `json:"format,omitempty"`
	// Backing are the files that a qcow2 image is based on, all of them, the nearest first.
	// They are only read, and must not change. What the image itself says of their names and
	// formats is not followed. For the disk of a VM of the same data directory there is nothing
	// to name, unless the VM is deleted and its root file system was a file of yours.
	Backing []DiskFile `json:"backing,omitempty"`
	// ReadOnly keeps the guest from writing to it; several running VMs may then
	// share it.
	ReadOnly bool `json:"read_only,omitempty"`
}

// DiskFile is a file that a disk image is based on.
type DiskFile struct {
	// Path of the file on the host.
	Path string `json:"path"`
	// Format of the file: it must be given.
	Format DiskFormat `json:"format"`
}

// Protocol is what a port is a port of.
type Protocol string

// The protocols that can be forwarded.
const (
	TCP Protocol = "tcp"
	UDP Protocol = "udp"
)

// PortForward connects a port of the host to one of the guest.
type PortForward struct {
	// HostAddr is the address to listen on. Zero: 127.0.0.1.
	HostAddr netip.Addr `json:"host_addr,omitzero"`
	// HostPort to listen on. Zero: any free port, chosen when the VM is created or
	// the forward is added, and the VM's from then on, unless another program has it when
	// the VM is started: then another is chosen.
	HostPort int `json:"host_port"`
	// GuestPort to connect to, 1 to 65535.
	GuestPort int `json:"guest_port"`
	// Protocol is "tcp" or "udp". Empty: "tcp".
	Protocol Protocol `json:"protocol"`
}

func (f PortForward) String() string {
	text := fmt.Sprintf("%s -> %d", netip.AddrPortFrom(f.HostAddr, uint16(f.HostPort)), f.GuestPort)
	if f.Protocol == UDP {
		text += "/udp"
	}
	return text
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// Sets of characters that names are made of. Names are checked by hand, as each
// regular expression costs every start of a program some time.
const (
	lowerCase = "abcdefghijklmnopqrstuvwxyz"
	letters   = lowerCase + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	digits    = "0123456789"
)

// madeOf reports whether a name begins and ends with characters of one set, and has
// those and others between.
func madeOf(name, edges, others string) bool {
	in := func(set string) func(rune) bool {
		return func(r rune) bool { return !strings.ContainsRune(set, r) }
	}
	return name != "" && !strings.ContainsFunc(name, in(edges+others)) &&
		!strings.ContainsFunc(name[:1]+name[len(name)-1:], in(edges))
}

// ValidateID reports what is wrong with a VM id; the error is a [*ValidationError].
func ValidateID(id string) error {
	if problem := idProblem(id); problem != "" {
		return &ValidationError{Fields: []FieldError{{Field: "id", Problem: problem}}}
	}
	return nil
}

func idProblem(id string) string {
	switch {
	case id == "":
		return "is empty; give the id of a VM"
	case len(id) > MaxIDLength:
		return fmt.Sprintf("has %d characters; at most %d are allowed", len(id), MaxIDLength)
	case !madeOf(id, lowerCase+digits, "-_"):
		return fmt.Sprintf("%q has illegal characters; use a-z, 0-9, and '-' or '_' inside", id)
	}
	return ""
}

// hostnameOf returns the host name of a VM that names none.
func hostnameOf(id string) string { return strings.ReplaceAll(id, "_", "-") }

// isVariable reports whether a name is one of a variable as shells have it.
func isVariable(name string) bool {
	return madeOf(name, letters+digits+"_", "") && !strings.ContainsAny(name[:1], digits)
}

// IsVariableName reports whether a [VMConfig].Env may have a variable of that name. Shells
// know no '.' and '-' in it, but programs do.
func IsVariableName(name string) bool {
	return madeOf(name, letters+digits+"_", ".-") && !strings.ContainsAny(name[:1], digits)
}

// CommandLine returns what [Run] runs in a VM of that configuration, given the arguments of
// its command: Entrypoint, and after it the arguments, or Cmd if there are none. It is empty
// if nothing of that is there.
func (c VMConfig) CommandLine(args ...string) []string {
	if len(args) == 0 {
		args = c.Cmd
	}
	return slices.Concat(c.Entrypoint, args)
}

// NewID makes up an id for a VM.
func NewID() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return "vm-" + hex.EncodeToString(b[:])
}

// UsesImage reports whether the VM boots an image rather than files of its own.
func (c VMConfig) UsesImage() bool { return c.KernelPath == "" }

// WithDefaults returns c with every default filled in. Slices and maps are
// copied, paths are made absolute.
func (c VMConfig) WithDefaults() VMConfig {
	if c.VCPUs == 0 {
		c.VCPUs = DefaultVCPUs
	}
	if c.MemoryMiB == 0 {
		c.MemoryMiB = DefaultMemoryMiB
	}
	if c.Image == "" && c.UsesImage() {
		c.Image = DefaultImage
	}
	if c.BootArgs == "" && !c.UsesImage() {
		c.BootArgs = DefaultBootArgs
	}
	if c.DiskMode == "" {
		c.DiskMode = DiskIsolated
	}
	if c.Network.Mode == "" {
		c.Network.Mode = NetworkUser
	}
	if !c.SSHHostAddr.IsValid() && c.Network.Mode.Forwards() {
		c.SSHHostAddr = loopback
	}
	if c.Hostname == "" {
		c.Hostname = hostnameOf(c.ID)
	}
	if c.Ready == "" {
		c.Ready = ReadyStarted
		if c.UsesImage() {
			c.Ready = ReadyAgent
		}
	}
	for _, p := range []*string{&c.KernelPath, &c.InitrdPath, &c.RootfsPath} {
		*p = absolute(*p)
	}
	c.RootfsBacking = withAbsolutePaths(c.RootfsBacking)
	c.Drives = slices.Clone(c.Drives)
	for i := range c.Drives {
		c.Drives[i].Path = absolute(c.Drives[i].Path)
		c.Drives[i].Backing = withAbsolutePaths(c.Drives[i].Backing)
	}
	c.Mounts = mountsWithDefaults(c.Mounts)
	c.PortForwards = slices.Clone(c.PortForwards)
	for i := range c.PortForwards {
		c.PortForwards[i] = c.PortForwards[i].WithDefaults()
	}
	c.Egress = c.Egress.Clone()
	c.Secrets = secretsWithDefaults(c.Secrets)
	c.AuthorizedKeys = slices.Clone(c.AuthorizedKeys)
	c.Env = maps.Clone(c.Env)
	c.Entrypoint, c.Cmd = slices.Clone(c.Entrypoint), slices.Clone(c.Cmd)
	c.Labels = maps.Clone(c.Labels)
	if c.Healthcheck != nil {
		check := *c.Healthcheck
		check.Command = slices.Clone(check.Command)
		c.Healthcheck = &check
	}
	return c
}

// Differences returns the names, as in JSON, of the fields in which two configurations
// differ, sorted. Both are to have their defaults filled in.
func (c VMConfig) Differences(other VMConfig) []string {
	ours, theirs := c.fields(), other.fields()
	var names []string
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		if !bytes.Equal(ours[name], theirs[name]) {
			names = append(names, name)
		}
	}
	for name := range theirs {
		if _, ok := ours[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (c VMConfig) fields() map[string]json.RawMessage {
	fields := map[string]json.RawMessage{}
	text, err := json.Marshal(c)
	if err == nil {
		err = json.Unmarshal(text, &fields)
	}
	if err != nil {
		panic(err) // all configurations can be encoded
	}
	return fields
}

// WithDefaults returns f with the protocol and the host address filled in.
func (f PortForward) WithDefaults() PortForward {
	if f.Protocol == "" {
		f.Protocol = TCP
	}
	if !f.HostAddr.IsValid() {
		f.HostAddr = loopback
	}
	return f
}

func withAbsolutePaths(files []DiskFile) []DiskFile {
	files = slices.Clone(files)
	for i := range files {
		files[i].Path = absolute(files[i].Path)
	}
	return files
}

func absolute(path string) string {
	if path == "" {
		return ""
	}
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// Validate checks all that can be known without touching the host, on a
// configuration with its defaults filled in. The error is a [*ValidationError]
// that names every bad field.
func (c VMConfig) Validate() error {
	v := validator{}
	v.check(idProblem(c.ID) == "", "id", "%s", idProblem(c.ID))
	v.check(c.VCPUs >= MinVCPUs && c.VCPUs <= MaxVCPUs, "vcpus",
		"%d is out of range; use %d to %d", c.VCPUs, MinVCPUs, MaxVCPUs)
	v.check(c.MemoryMiB >= MinMemoryMiB && c.MemoryMiB <= MaxMemoryMiB, "memory_mib",
		"%d MiB is out of range; use %d to %d", c.MemoryMiB, MinMemoryMiB, MaxMemoryMiB)
	v.check(c.CPULimit == 0 || c.CPULimit >= MinCPULimit && c.CPULimit <= MaxCPULimit, "cpu_limit",
		"%g is out of range; use %g to %g, or 0 for no limit", c.CPULimit, MinCPULimit, float64(MaxCPULimit))
	c.validateBoot(&v)
	c.validateDisks(&v)
	c.validateMounts(&v)
	c.validateGuest(&v)
	c.validateNetwork(&v)
	c.validateSecrets(&v)
	c.validateHealth(&v)
	for i, f := range c.PortForwards {
		field := fmt.Sprintf("port_forwards[%d]", i)
		v.fields = append(v.fields, f.problems(field)...)
		for _, other := range c.PortForwards[:i] {
			v.check(f.HostPort == 0 || f.HostPort != other.HostPort || f.HostAddr != other.HostAddr || f.Protocol != other.Protocol,
				field+".host_port", "%d is forwarded twice", f.HostPort)
		}
	}
	if len(v.fields) > 0 {
		return &ValidationError{ID: c.ID, Fields: v.fields}
	}
	return nil
}

// Validate checks the forward's ports; the error is a [*ValidationError].
func (f PortForward) Validate() error {
	if problems := f.problems("port_forward"); len(problems) > 0 {
		return &ValidationError{Fields: problems}
	}
	return nil
}

func (f PortForward) problems(field string) []FieldError {
	v := validator{}
	v.check(f.Protocol == TCP || f.Protocol == UDP, field+".protocol", "%q is not known; use tcp or udp", f.Protocol)
	v.check(f.HostPort >= 0 && f.HostPort <= 65535, field+".host_port",
		"%d is out of range; use 1 to 65535, or 0 for any free port", f.HostPort)
	v.check(f.GuestPort >= 1 && f.GuestPort <= 65535, field+".guest_port",
		"%d is out of range; use 1 to 65535", f.GuestPort)
	return v.fields
}

func (c VMConfig) validateBoot(v *validator) {
	v.check(c.Backend == "" || isBackendName(c.Backend), "backend",
		"%q is no name of a backend, which has at most 32 lower-case letters, digits and hyphens", c.Backend)
	if c.UsesImage() {
		v.check(c.InitrdPath == "", "initrd_path", "needs kernel_path beside it")
		v.check(c.RootfsPath == "", "rootfs_path", "needs kernel_path beside it")
	} else {
		v.check(c.Image == "", "image", "excludes kernel_path; give one of the two")
		v.check(c.RootfsPath != "" || c.InitrdPath != "", "rootfs_path",
			"is missing; a kernel needs a root file system or an initramfs")
		v.check(c.WarmUp == "", "warm_up", "a VM with its own kernel has no agent to run it")
		v.check(c.Ready != ReadyAgent, "ready",
			"a VM with its own kernel has no agent; use ssh or started")
	}
	switch c.Ready {
	case ReadyAgent, ReadySSH, ReadyStarted:
	default:
		v.add("ready", "%q is not known; use agent, ssh or started", c.Ready)
	}
	// The kernel cuts its command line at 2048 bytes (COMMAND_LINE_SIZE on x86),
	// and a backend adds some of its own.
	v.check(len(c.BootArgs) <= 1536, "boot_args", "has %d bytes; at most 1536 are allowed", len(c.BootArgs))
	v.check(!strings.ContainsAny(c.BootArgs, "\n\x00"), "boot_args", "has a line break or NUL in it")
	v.check(c.TTL >= 0, "ttl_ms", "is negative")
}

// isBackendName reports whether a backend could have the name. Which backends there are only
// the program that runs VMs knows.
func isBackendName(name string) bool {
	return len(name) <= 32 && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

func (c VMConfig) validateDisks(v *validator) {
	switch c.DiskMode {
	case DiskIsolated:
	case DiskShared:
		v.check(c.DiskSizeMiB == 0, "disk_size_mib", "is only for disk_mode isolated")
		v.check(!c.UsesImage(), "disk_mode",
			"shared would let the VM write to the image itself; give a rootfs_path, or use isolated")
	default:
		v.add("disk_mode", "%q is not known; use isolated or shared", c.DiskMode)
	}
	v.check(c.DiskSizeMiB >= 0 && c.DiskSizeMiB <= MaxDiskSizeMiB, "disk_size_mib",
		"%d MiB is out of range; use 0 to %d", c.DiskSizeMiB, MaxDiskSizeMiB)
	v.check(c.DiskBytesPerSecond == 0 || c.DiskBytesPerSecond >= MinDiskBytesPerSecond && c.DiskBytesPerSecond <= MaxDiskRate,
		"disk_bytes_per_second", "%d is out of range; use %d to %d, or 0 for no limit", c.DiskBytesPerSecond, MinDiskBytesPerSecond, MaxDiskRate)
	v.check(c.DiskIOPS == 0 || c.DiskIOPS >= MinDiskIOPS && c.DiskIOPS <= MaxDiskRate,
		"disk_iops", "%d is out of range; use %d to %d, or 0 for no limit", c.DiskIOPS, MinDiskIOPS, MaxDiskRate)
	v.check(c.RootfsFormat.problem() == "", "rootfs_format", "%s", c.RootfsFormat.problem())
	v.check(c.RootfsFormat == "" || c.RootfsPath != "", "rootfs_format", "needs rootfs_path beside it")
	for i, d := range c.Drives {
		v.check(d.Path != "", fmt.Sprintf("drives[%d].path", i), "is empty")
		v.check(d.Format.problem() == "", fmt.Sprintf("drives[%d].format", i), "%s", d.Format.problem())
		validateBacking(v, fmt.Sprintf("drives[%d].backing", i), d.Format, d.Backing)
	}
	validateBacking(v, "rootfs_backing", c.RootfsFormat, c.RootfsBacking)
	// vda to vdz; the first is the root disk.
	v.check(len(c.Drives) <= 25, "drives", "%d are too many; at most 25 are allowed", len(c.Drives))
}

// validateBacking checks the files that a disk image of a format is based on.
func validateBacking(v *validator, field string, format DiskFormat, files []DiskFile) {
	v.check(len(files) == 0 || format == FormatQCOW2, field, "is for an image of format %s only", FormatQCOW2)
	for i, file := range files {
		field := fmt.Sprintf("%s[%d]", field, i)
		v.check(file.Path != "", field+".path", "is empty")
		v.check(file.Format != "", field+".format", "is missing; use %s or %s", FormatRaw, FormatQCOW2)
		v.check(file.Format.problem() == "", field+".format", "%s", file.Format.problem())
	}
}

func (c VMConfig) validateGuest(v *validator) {
	for _, key := range slices.Sorted(maps.Keys(c.Env)) {
		v.check(IsVariableName(key), "env",
			"%q is not the name of a variable; use letters, digits and '_', not a digit first, with '.' and '-' inside", key)
		v.check(!strings.ContainsRune(c.Env[key], 0), "env", "%s has a NUL in its value", key)
		v.check(utf8.ValidString(c.Env[key]), "env", "the value of %s is not UTF-8, which a VM's configuration has to be; give it to each command instead", key)
	}
	v.check(c.Init == "" || c.Init == InitAuto || strings.HasPrefix(c.Init, "/") && !strings.ContainsFunc(c.Init, isBlank), "init",
		"%q is no absolute path without blanks", c.Init)
	v.check(!c.PublishAll || c.Network.Mode.Forwards(), "publish_all", "network mode %s has no port forwards", c.Network.Mode)
	v.check(c.WorkingDir == "" || strings.HasPrefix(c.WorkingDir, "/"), "working_dir", "%q is no absolute path", c.WorkingDir)
	for field, texts := range map[string][]string{"working_dir": {c.WorkingDir}, "user": {c.User}, "entrypoint": c.Entrypoint, "cmd": c.Cmd} {
		for _, text := range texts {
			v.check(!strings.ContainsRune(text, 0) && utf8.ValidString(text), field, "has a NUL in it, or is not UTF-8")
		}
	}
	if !c.UsesImage() {
		v.check(c.WorkingDir == "" && c.User == "" && c.Init == "" && len(c.Entrypoint)+len(c.Cmd) == 0, "kernel_path",
			"a VM with its own kernel has no agent: working_dir, user, entrypoint, cmd and init are for images")
	}
	// A host name that follows from a bad id is not a second mistake.
	if c.Hostname != "" && c.Hostname != hostnameOf(c.ID) {
		v.check(len(c.Hostname) <= MaxIDLength && madeOf(c.Hostname, letters+digits, "-"), "hostname",
			"%q is not a host name; use letters, digits, and '-' inside, at most %d", c.Hostname, MaxIDLength)
	}
	v.check(len(c.Labels) <= MaxLabels, "labels", "%d are too many; at most %d are allowed", len(c.Labels), MaxLabels)
	for _, name := range slices.Sorted(maps.Keys(c.Labels)) {
		if problem := labelProblem(name, c.Labels[name]); problem != "" {
			v.add("labels", "%s", problem)
		}
	}
	for i, key := range c.AuthorizedKeys {
		v.check(len(strings.Fields(key)) >= 2 && !strings.ContainsAny(key, "\n\r"),
			fmt.Sprintf("authorized_keys[%d]", i), "is not one line of OpenSSH's public key format")
	}
}

// validator collects the bad fields of a configuration.
type validator struct{ fields []FieldError }

func (v *validator) add(field, format string, args ...any) {
	v.fields = append(v.fields, FieldError{Field: field, Problem: fmt.Sprintf(format, args...)})
}

func (v *validator) check(ok bool, field, format string, args ...any) {
	if !ok {
		v.add(field, format, args...)
	}
}
