package smolvm

import "time"

// Image is an immutable set of kernel, initramfs, root file system and
// defaults, kept by digest.
type Image struct {
	// Digest is "sha256:" and 64 hexadecimal digits over the image's recipe
	// and content.
	Digest string `json:"digest"`
	// Names point to the image; a newer build of a name takes it over.
	Names []string `json:"names"`
	// KernelPath, InitrdPath and RootfsPath are files in the image store.
	KernelPath string `json:"kernel_path"`
	InitrdPath string `json:"initrd_path"`
	RootfsPath string `json:"rootfs_path"`
	// SmallRootfsPath holds the same files in a small file system, for VMs whose disk is
	// to be smaller than RootfsPath's; empty if there is none.
	SmallRootfsPath string `json:"small_rootfs_path,omitempty"`
	// BootArgs are the image's default kernel arguments.
	BootArgs string `json:"boot_args"`
	// Arch is the image's architecture as Go names it, as in "amd64".
	Arch string `json:"arch"`
	// Source tells in words what the image was made from.
	Source string `json:"source"`
	// Size is the space the image takes on disk, in bytes.
	Size int64 `json:"size_bytes"`
	// CreatedAt is when it was built, in UTC.
	CreatedAt time.Time `json:"created_at"`
}

// Progress is one step of a long operation.
type Progress struct {
	// Phase says what is being done, as in "download kernel".
	Phase string
	// Done and Total count bytes; Total is zero where it is not known, and both
	// are where there is nothing to count.
	Done, Total int64
}

// BuildOptions are the options of [Images.BuildImage].
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
	// Progress is told how the building goes on; it may be nil.
	Progress func(Progress)
}
