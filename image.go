package smolvm

import (
	"io"
	"time"
)

// Image is an immutable set of kernel, initramfs, root file system and
// defaults, kept by digest.
type Image struct {
	// Digest is "sha256:" and 64 hexadecimal digits over the image's recipe
	// and content.
	Digest string `json:"digest"`
	// Names point to the image; a newer build of a name takes it over.
	Names []string `json:"names"`
	// Hides are the names of OCI images that are here and that one of Names, as it is ours, keeps
	// from being meant; their whole names, as they are here, reach them.
	Hides []string `json:"hides,omitempty"`
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
	// OCI is the OCI image that it was made from; nil if it was made from files or packages.
	OCI *OCIImage `json:"oci,omitempty"`
	// Config is what the OCI image says of the program in it; nil where OCI is.
	Config *ImageConfig `json:"config,omitempty"`
	// CreatedAt is when it was built, in UTC.
	CreatedAt time.Time `json:"created_at"`
}

// OCIImage is the OCI image that an [Image] was made from.
type OCIImage struct {
	// Digest is that of its manifest. A registry's image is pinned by it, as in
	// "python@sha256:…".
	Digest string `json:"digest"`
	// Reference is the whole name by which it was found when it was made bootable, as in
	// "docker.io/library/python:3.12"; empty if it had none.
	Reference string `json:"reference,omitempty"`
}

// ImageConfig is what an OCI image says of the program in it.
type ImageConfig struct {
	// Entrypoint and Cmd are what is run, one after the other.
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	// Env are variables, as "NAME=value", each name once.
	Env []string `json:"env,omitempty"`
	// WorkingDir is the directory that commands are run in. Empty: /.
	WorkingDir string `json:"working_dir,omitempty"`
	// User is who runs them, as in [Command]. Empty: root.
	User string `json:"user,omitempty"`
	// ExposedPorts are what the program listens on, in order, as in "80/tcp".
	ExposedPorts []string `json:"exposed_ports,omitempty"`
	// StopSignal is the name or number of the signal that ends it. Empty: SIGTERM.
	StopSignal string `json:"stop_signal,omitempty"`
	// Labels are for people.
	Labels map[string]string `json:"labels,omitempty"`
	// Volumes are the directories in which it keeps data that outlive it, in order.
	Volumes []string `json:"volumes,omitempty"`
	// Healthcheck is how to find out that it works; nil if the image does not say.
	Healthcheck *Healthcheck `json:"healthcheck,omitempty"`
}

// Healthcheck is how to find out that a program works.
type Healthcheck struct {
	// Command is what is run: its success is health.
	Command []string `json:"command"`
	// Shell reports whether Command is one line for the guest's shell.
	Shell bool `json:"shell,omitempty"`
	// Interval is the time between checks, and Timeout how long one may take.
	Interval time.Duration `json:"-"` // "interval_ms"
	Timeout  time.Duration `json:"-"` // "timeout_ms"
	// StartPeriod is the time in which a failure does not count, and StartInterval the time
	// between checks in it.
	StartPeriod   time.Duration `json:"-"` // "start_period_ms"
	StartInterval time.Duration `json:"-"` // "start_interval_ms"
	// Retries is how many failures in a row mean that it does not work.
	Retries int `json:"retries"`
}

// PullPolicy says when an OCI image is pulled for a new VM.
type PullPolicy string

const (
	// PullMissing pulls an image that is not here. It is the default.
	PullMissing PullPolicy = "missing"
	// PullAlways asks the registry first what the name means now; layers that are here are
	// not fetched again.
	PullAlways PullPolicy = "always"
	// PullNever pulls nothing.
	PullNever PullPolicy = "never"
)

// PullOptions are the options of [Images.PullImage].
type PullOptions struct {
	// Platform is what the image is to be for, as in "linux/arm64". Empty: this host's
	// guests.
	Platform string
	// Progress is told how the pulling goes on; it may be nil.
	Progress func(Progress)
}

// CommitOptions are the options of [Images.CommitImage]. The zero value is useful.
type CommitOptions struct {
	// Author and Message are kept with the image.
	Author, Message string
	// Changes are instructions of a Dockerfile that change the configuration, one each, such as
	// `CMD ["serve"]`: CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER,
	// VOLUME and WORKDIR.
	Changes []string
	// NoPause lets the VM's commands go on while it is read. By default they are held, so that
	// the image has their files as they were at one moment.
	NoPause bool
	// Progress is told how the image is made bootable; it may be nil.
	Progress func(Progress)
}

// Progress is one step of a long operation.
type Progress struct {
	// Phase says what is being done, as in "download kernel".
	Phase string
	// Item is which of several that are done at once, as in "layer 2 of 5"; empty otherwise.
	Item string
	// Done and Total count bytes; Total is zero where it is not known, and both
	// are where there is nothing to count.
	Done, Total int64
}

// BuildOptions are the options of [Images.BuildImage].
type BuildOptions struct {
	// Name of the image. Empty: "base", or the one that RecipeFile has. Of a built-in one, such
	// as "dev", the image is built as it is when it is first used.
	Name string
	// Packages are packages of the host's distribution, Debian or Ubuntu, that the image is made
	// of, with what they depend on. One may have a version: git=1:2.39.5-0.
	Packages []string
	// RecipeFile is the file of a recipe for such an image; docs/images.md has its keys.
	// Packages are added to it.
	RecipeFile string
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

// ImportOptions are the options of [Images.ImportImage]. Exactly one of Archive, Dir and Daemon
// is given.
type ImportOptions struct {
	// Archive is read to its end: one of `docker save` or `podman save`, or an OCI layout as
	// tar, packed by gzip or not.
	Archive io.Reader
	// Dir is an OCI layout, which is a directory.
	Dir string
	// Daemon takes the image Name from the daemon of docker or podman: at Socket, or if that
	// is empty at the first of the usual sockets whose daemon has it.
	Daemon bool
	Socket string
	// Name is the name that the image gets. Empty: those that it has in the archive or layout.
	Name string
	// Platform is what the image is to be for, as in [PullOptions].
	Platform string
	// Progress is told how the importing goes on; it may be nil.
	Progress func(Progress)
}

// ExportOptions are the options of [Images.ExportImage]. Exactly one of the fields is given.
type ExportOptions struct {
	// Archive gets an archive that `docker load`, `podman load` and [Images.ImportImage] read:
	// an OCI layout as tar, with docker's manifest.json in it.
	Archive io.Writer
	// Dir becomes an OCI layout: it is made, or is there and empty.
	Dir string
}

// PushOptions are the options of [Images.PushImage].
type PushOptions struct {
	// Progress is told how the pushing goes on; it may be nil.
	Progress func(Progress)
}

// ImageStep is one step by which an image was made.
type ImageStep struct {
	// CreatedAt is when, in UTC; the zero time if it is not known.
	CreatedAt time.Time `json:"created_at,omitzero"`
	// CreatedBy is the command, and Comment what was said of it, as the image has them.
	CreatedBy string `json:"created_by,omitempty"`
	Comment   string `json:"comment,omitempty"`
	// Layer is the digest of the layer that it made; empty if it changed the configuration
	// only. Size is the layer's as it is stored, in bytes.
	Layer string `json:"layer,omitempty"`
	Size  int64  `json:"size_bytes"`
}
