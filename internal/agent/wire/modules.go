package wire

// ModulesManifest is the file in an initramfs that lists its kernel modules, as a
// JSON array of [Module] in the order in which they must be loaded.
const ModulesManifest = "/lib/smolvm/modules.json"

// Module is one kernel module of an initramfs.
type Module struct {
	// Path of the module's file.
	Path string `json:"path"`
	// Transport limits a module to machines whose virtio devices are on that bus:
	// "mmio" or "pci". Empty: any machine.
	Transport string `json:"transport,omitempty"`
	// Use says when the module is needed: [UseBoot] before the root file system is
	// mounted and the guest channel opened, [UseLate] not before the network is up,
	// [UsePort] and [UseVsock] as UseBoot, but only where the guest channel is a
	// virtio-serial port or vsock, [UseDemand] when something in the guest asks for it.
	Use string `json:"use"`
}

// The values of [Module].Use.
const (
	UseBoot  = "boot"
	UsePort  = "port"
	UseVsock = "vsock"
	UseLate  = "late"
	// UseDemand is known to agents that come in the same initramfs.
	UseDemand = "demand"
)
