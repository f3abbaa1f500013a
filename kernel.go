package smolvm

import "time"

// KernelOptions are the options of [Images.BuildKernel]. The zero value is useful.
type KernelOptions struct {
	// Version of the kernel, as in "6.12", of which the host's distribution has the source. Empty:
	// that of its own kernel, which images have by default.
	Version string
	// Jobs is how many files are compiled at once. Zero: as many as the host has processors.
	Jobs int
	// Force builds even if there is such a kernel.
	Force bool
	// Unused leaves it to the caller what boots with the kernel, as by [BuildOptions]. Otherwise
	// images boot with it from then on.
	Unused bool
	// Progress is told how the building goes on; it may be nil.
	Progress func(Progress)
}

// Kernel is a kernel for guests that was built on this host.
type Kernel struct {
	// Name tells kernels apart: the package, its version, and a sum of the kernel.
	Name string `json:"name"`
	// Package is the distribution's package with the source, and Version that of the package.
	Package string `json:"package"`
	Version string `json:"version"`
	// Compiler is what it was built by.
	Compiler string `json:"compiler"`
	// Path is the kernel, as ELF. ConfigPath is the configuration and SourcePath the package with
	// the source, which whoever passes the kernel on has to offer.
	Path       string `json:"path"`
	ConfigPath string `json:"config_path"`
	SourcePath string `json:"source_path"`
	// Used reports whether images boot with it.
	Used bool `json:"used"`
	// CreatedAt is when it was built, in UTC.
	CreatedAt time.Time `json:"created_at"`
}
