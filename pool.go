package smolvm

// Pool is a number of VMs that are kept ready to be handed out.
type Pool struct {
	ID string `json:"id"`
	// Size is how many are to be ready, and Ready how many are.
	Size  int `json:"size"`
	Ready int `json:"ready"`
	// Image, VCPUs, MemoryMiB, DiskSizeMiB and WarmUp are what VMs of it are like.
	Image       string `json:"image"`
	VCPUs       int    `json:"vcpus"`
	MemoryMiB   int    `json:"memory_mib"`
	DiskSizeMiB int64  `json:"disk_size_mib,omitempty"`
	WarmUp      string `json:"warm_up,omitempty"`
	// Network is as in [Template].
	Network NetworkMode `json:"network"`
}

// PoolOptions say what VMs to keep ready, and how many. Zero values are those of
// [VMConfig].
type PoolOptions struct {
	Size        int
	Image       string
	VCPUs       int
	MemoryMiB   int
	DiskSizeMiB int64
	WarmUp      string
	Network     NetworkMode
	// Progress is told how the building of a missing image goes on; it may be nil.
	Progress func(Progress)
}
