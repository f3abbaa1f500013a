package smolvm

import "time"

// Template is a saved VM that others are cloned from.
type Template struct {
	ID string `json:"id"`
	// Image, VCPUs, MemoryMiB, DiskSizeMiB and WarmUp are what it is a template of.
	Image       string `json:"image"`
	VCPUs       int    `json:"vcpus"`
	MemoryMiB   int    `json:"memory_mib"`
	DiskSizeMiB int64  `json:"disk_size_mib,omitempty"`
	WarmUp      string `json:"warm_up,omitempty"`
	// Network is what guests of it are connected by: [NetworkUser], [NetworkNone], or
	// [NetworkTAP], which [NetworkBridge] shares.
	Network     NetworkMode `json:"network"`
	Backend     string      `json:"backend"`
	Accelerator string      `json:"accelerator"`
	// Stale says that no VM will be cloned from it any more, as the VMM, the host or
	// smolvm is another one since.
	Stale bool `json:"stale,omitempty"`
	// Size is what it takes on disk, in bytes.
	Size      int64     `json:"size_bytes"`
	CreatedAt time.Time `json:"created_at"`
	UsedAt    time.Time `json:"used_at"`
}

// TemplateOptions are the options of [Templates.BuildTemplate]: what VMs of the template
// are like. Zero values are those of [VMConfig].
type TemplateOptions struct {
	Image       string
	VCPUs       int
	MemoryMiB   int
	DiskSizeMiB int64
	WarmUp      string
	Network     NetworkMode
	// Timeout is how long the VM may take to be ready. Zero: as of [StartOptions].
	Timeout time.Duration
	// Force makes another one even if there is one.
	Force bool
	// Progress is told how the building of a missing image goes on; it may be nil.
	Progress func(Progress)
}

// PruneTemplateOptions are the options of [Templates.PruneTemplates].
type PruneTemplateOptions struct {
	// MaxBytes is how much of the disk templates may take together. Zero:
	// [DefaultTemplateBytes].
	MaxBytes int64
	// All removes all templates.
	All bool
}

// DefaultTemplateBytes is what templates may take on disk: that is about 40 of the
// usual size.
const DefaultTemplateBytes = 4 << 30
