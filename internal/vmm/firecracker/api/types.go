package api

// States of an instance.
const (
	StateNotStarted = "Not started"
	StateRunning    = "Running"
	StatePaused     = "Paused"
)

// InstanceInfo is what GET / returns.
type InstanceInfo struct {
	AppName string `json:"app_name"`
	ID      string `json:"id"`
	// State is [StateNotStarted], [StateRunning] or [StatePaused].
	State   string `json:"state"`
	Version string `json:"vmm_version"`
}

// Huge pages.
const (
	HugePagesNone        = "None"
	HugePages2M          = "2M"
	HugePagesTransparent = "Transparent" // see [TransparentHugePages]
	HugePagesSnapshot    = "Snapshot"    // of a [LoadParams]: as the guest was saved
)

// MachineConfig is the machine. Firecracker's default is one CPU, and 128 MiB.
type MachineConfig struct {
	VCPUs     int `json:"vcpu_count"`
	MemoryMiB int `json:"mem_size_mib"`
	// SMT has pairs of CPUs be threads of one core.
	SMT bool `json:"smt,omitempty"`
	// TrackDirtyPages lets diff snapshots be made of what the guest has written.
	TrackDirtyPages bool `json:"track_dirty_pages,omitempty"`
	// HugePages back the guest's memory. Empty: none.
	HugePages string `json:"huge_pages,omitempty"`
}

// MachineConfigUpdate changes a [MachineConfig] before the guest is started. What is nil stays
// as it is.
type MachineConfigUpdate struct {
	VCPUs           *int   `json:"vcpu_count,omitempty"`
	MemoryMiB       *int   `json:"mem_size_mib,omitempty"`
	SMT             *bool  `json:"smt,omitempty"`
	TrackDirtyPages *bool  `json:"track_dirty_pages,omitempty"`
	HugePages       string `json:"huge_pages,omitempty"`
}

// BootSource is what the guest boots.
type BootSource struct {
	// Kernel is the path of an ELF kernel on x86-64, of a PE image on arm64; see [BzImage].
	Kernel string `json:"kernel_image_path"`
	Initrd string `json:"initrd_path,omitempty"`
	// BootArgs are the kernel's arguments. Empty: Firecracker's own.
	BootArgs string `json:"boot_args,omitempty"`
}

// TokenBucket is a limit: Size tokens come within RefillTime. One without either is none.
type TokenBucket struct {
	// Size is how many tokens the bucket holds.
	Size int64 `json:"size"`
	// OneTimeBurst are tokens beside those, which don't come again.
	OneTimeBurst int64 `json:"one_time_burst,omitempty"`
	// RefillTime is in milliseconds.
	RefillTime int64 `json:"refill_time"`
}

// RateLimiter limits a device's speed.
type RateLimiter struct {
	// Bandwidth has bytes as tokens, Ops operations. Nil: no limit, or the one that is in
	// force if it is a change.
	Bandwidth *TokenBucket `json:"bandwidth,omitempty"`
	Ops       *TokenBucket `json:"ops,omitempty"`
}

// How a drive's writes reach the disk, and by what.
const (
	// CacheUnsafe does nothing when the guest flushes, and is Firecracker's default.
	CacheUnsafe = "Unsafe"
	// CacheWriteback syncs the file when the guest flushes.
	CacheWriteback = "Writeback"

	EngineSync  = "Sync"  // one request after the other; Firecracker's default
	EngineAsync = "Async" // io_uring
)

// Drive is a virtio block device. Its file is raw.
type Drive struct {
	ID   string `json:"drive_id"`
	Path string `json:"path_on_host"`
	// Root has Firecracker tell the kernel that this is its root file system.
	Root        bool         `json:"is_root_device"`
	PartUUID    string       `json:"partuuid,omitempty"`
	ReadOnly    bool         `json:"is_read_only"`
	CacheType   string       `json:"cache_type,omitempty"`
	IOEngine    string       `json:"io_engine,omitempty"`
	RateLimiter *RateLimiter `json:"rate_limiter,omitempty"`
}

// DriveUpdate changes a [Drive] of a running guest. What is not set stays as it is.
type DriveUpdate struct {
	ID string `json:"drive_id"`
	// Path is another file, which the guest is told of as a change of the drive's size.
	Path        string       `json:"path_on_host,omitempty"`
	RateLimiter *RateLimiter `json:"rate_limiter,omitempty"`
}

// NetworkInterface is a virtio network device on a TAP interface.
type NetworkInterface struct {
	ID string `json:"iface_id"`
	// TAP is the interface's name in Firecracker's network namespace.
	TAP string `json:"host_dev_name"`
	MAC string `json:"guest_mac,omitempty"`
	// MTU in bytes is offered to the guest. Zero: none is; see [MTU].
	MTU       int          `json:"mtu,omitempty"`
	RXLimiter *RateLimiter `json:"rx_rate_limiter,omitempty"`
	TXLimiter *RateLimiter `json:"tx_rate_limiter,omitempty"`
}

// NetworkInterfaceUpdate changes the limits of a running guest's [NetworkInterface].
type NetworkInterfaceUpdate struct {
	ID        string       `json:"iface_id"`
	RXLimiter *RateLimiter `json:"rx_rate_limiter,omitempty"`
	TXLimiter *RateLimiter `json:"tx_rate_limiter,omitempty"`
}

// Vsock is a virtio socket device, and the unix socket that the host connects to.
type Vsock struct {
	// GuestCID is the guest's address, 3 or more.
	GuestCID uint32 `json:"guest_cid"`
	Path     string `json:"uds_path"`
}

// Logger is Firecracker's log.
type Logger struct {
	Path string `json:"log_path,omitempty"`
	// Level is "Error", "Warning", "Info", "Debug", "Trace" or "Off". Empty: "Info".
	Level      string `json:"level,omitempty"`
	ShowLevel  bool   `json:"show_level,omitempty"`
	ShowOrigin bool   `json:"show_log_origin,omitempty"`
	Module     string `json:"module,omitempty"`
}

// Metrics are written to a file or a named pipe, a line of JSON each minute or when they are
// flushed.
type Metrics struct {
	Path string `json:"metrics_path"`
	// EmitID and Properties label each line; see [MetricsLabels].
	EmitID     bool              `json:"emit_id,omitempty"`
	Properties map[string]string `json:"properties,omitempty"`
}

// Entropy is a virtio random number device.
type Entropy struct {
	RateLimiter *RateLimiter `json:"rate_limiter,omitempty"`
}

// Balloon takes memory from the guest.
type Balloon struct {
	AmountMiB    int  `json:"amount_mib"`
	DeflateOnOOM bool `json:"deflate_on_oom"`
	// StatsInterval is in seconds. Zero: no statistics.
	StatsInterval int `json:"stats_polling_interval_s,omitempty"`
	// FreePageHinting and FreePageReporting: see [FreePages].
	FreePageHinting   bool `json:"free_page_hinting,omitempty"`
	FreePageReporting bool `json:"free_page_reporting,omitempty"`
}

// BalloonUpdate changes the size of a running guest's [Balloon].
type BalloonUpdate struct {
	AmountMiB int `json:"amount_mib"`
}

// SerialDevice is where the serial console goes; see [Serial].
type SerialDevice struct {
	// Path is a file or a named pipe. Empty: Firecracker's standard output.
	Path string `json:"serial_out_path,omitempty"`
	// RateLimiter drops what is beyond it; see [SerialLimit].
	RateLimiter *TokenBucket `json:"rate_limiter,omitempty"`
}

// Action is something that Firecracker does at once.
type Action string

// The actions.
const (
	InstanceStart  Action = "InstanceStart"
	SendCtrlAltDel Action = "SendCtrlAltDel" // on x86-64
	FlushMetrics   Action = "FlushMetrics"
)

// VMState is what a guest is to do.
type VMState string

// The states.
const (
	Paused  VMState = "Paused"
	Resumed VMState = "Resumed"
)

// Types of snapshots.
const (
	SnapshotFull = "Full"
	SnapshotDiff = "Diff" // see [UntrackedDiff]
)

// CreateParams say how a paused guest is saved.
type CreateParams struct {
	Memory string `json:"mem_file_path"`
	State  string `json:"snapshot_path"`
	Type   string `json:"snapshot_type,omitempty"` // empty: [SnapshotFull]
}

// Backends of a restored guest's memory.
const (
	BackendFile = "File"
	BackendUffd = "Uffd" // a process that serves page faults
)

// MemoryBackend is where a restored guest's memory comes from.
type MemoryBackend struct {
	Type string `json:"backend_type"`
	// Path is that of the file, or of the process's unix socket.
	Path string `json:"backend_path"`
}

// LoadParams say how a guest is restored.
type LoadParams struct {
	State  string        `json:"snapshot_path"`
	Memory MemoryBackend `json:"mem_backend"`
	// Resume has the guest go on at once.
	Resume bool `json:"resume_vm,omitempty"`
	// EnableDiff is the name of TrackDirty before [TrackDirtyOnLoad].
	EnableDiff bool `json:"enable_diff_snapshots,omitempty"`
	TrackDirty bool `json:"track_dirty_pages,omitempty"`
	// Networks: see [NetworkOverrides].
	Networks []NetworkOverride `json:"network_overrides,omitempty"`
	// Vsock: see [VsockOverride].
	Vsock *VsockPath `json:"vsock_override,omitempty"`
	// ClockRealtime: see there.
	ClockRealtime bool `json:"clock_realtime,omitempty"`
	// HugePages: see [HugePagesOnLoad].
	HugePages string `json:"huge_pages,omitempty"`
}

// NetworkOverride is another TAP interface for a restored guest's network interface.
type NetworkOverride struct {
	ID  string `json:"iface_id"`
	TAP string `json:"host_dev_name"`
}

// VsockPath is another unix socket for a restored guest's vsock.
type VsockPath struct {
	Path string `json:"uds_path"`
}
