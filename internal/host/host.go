// Package host finds out what this host can do for VMs: which accelerator works,
// which programs are installed, and what would fix what is missing.
package host

import (
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Options of a [Host].
type Options struct {
	// CacheDir keeps what the probe of KVM found, for other processes and until
	// the host boots again. It is made if need be. Empty: each Host probes anew.
	CacheDir string
}

// Host answers questions about this host. It is safe for concurrent use.
type Host struct {
	cacheDir string
	// root stands before every path that is read: "/" but in tests.
	root   string
	uid    int
	groups []int // this process's own, the effective one among them
	probe  prober

	mu    sync.Mutex // guards the following; held while KVM is probed
	known *probed
}

// prober runs a loop of some iterations on KVM, cut off after a limit, and measures it.
type prober func(device string, iterations int, limit time.Duration) (measured, error)

// New returns a Host.
func New(opts Options) *Host {
	groups, _ := os.Getgroups() // it fails on no Linux; the effective group would do
	return &Host{
		cacheDir: opts.CacheDir,
		root:     "/",
		uid:      os.Geteuid(),
		groups:   append(groups, os.Getegid()),
		probe:    probe,
	}
}

func (h *Host) path(name string) string { return filepath.Join(h.root, name) }

// read returns a small file's text, or nothing.
func (h *Host) read(name string) string {
	text, err := os.ReadFile(h.path(name))
	if err != nil {
		return ""
	}
	return string(text)
}
