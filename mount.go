package smolvm

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// MaxMounts is how many directories of the host a VM may have.
const MaxMounts = 64

// MountMode says what a guest may do with a directory of the host.
type MountMode string

const (
	// MountReadWrite lets the guest change the directory. It is the default.
	MountReadWrite MountMode = "rw"
	// MountReadOnly keeps the guest from changing the directory: the host refuses it.
	MountReadOnly MountMode = "ro"
	// MountOverlay lets the guest change what it sees of the directory, and keeps its changes apart,
	// on the VM's disk: see [Changes]. A file that the guest has changed is no longer seen as it is
	// on the host.
	MountOverlay MountMode = "overlay"
)

// Mount is a directory of the host that a guest has as one of its own. What either side changes
// the other sees: a file that was changed on the host is seen as it is now by the next open in
// the guest. The guest can't leave the directory, and links in it are the guest's to follow.
// Everything in it appears as owned by the user whose commands the guest runs, and changes of owners
// are ignored, except in an overlay; what the guest makes is owned by the user who runs the VM.
type Mount struct {
	// Source is the directory of the host. It must be there.
	Source string `json:"source"`
	// Target is where it is in the guest, an absolute path. What is missing of it is made.
	Target string `json:"target"`
	// Mode is "rw" (the default), "ro" or "overlay".
	Mode MountMode `json:"mode"`
	// Since is when the guest's changes of an overlay began: Create sets it, and Apply anew. Files that
	// have changed on the host since then are not those that the guest has changed.
	Since time.Time `json:"seen_at,omitzero"`
}

// OverlayName returns the name under which a guest keeps its changes of an overlay; empty for other
// mounts.
func (m Mount) OverlayName() string {
	if m.Mode != MountOverlay {
		return ""
	}
	sum := sha256.Sum256([]byte(m.Target))
	return hex.EncodeToString(sum[:8])
}

// WithDefaults returns m with the mode filled in, and paths made absolute.
func (m Mount) WithDefaults() Mount {
	if m.Mode == "" {
		m.Mode = MountReadWrite
	}
	m.Source = absolute(m.Source)
	if path.IsAbs(m.Target) {
		m.Target = path.Clean(m.Target)
	}
	return m
}

func mountsWithDefaults(mounts []Mount) []Mount {
	mounts = slices.Clone(mounts)
	for i := range mounts {
		mounts[i] = mounts[i].WithDefaults()
	}
	return mounts
}

// kernelDirs are where a guest has what is its kernel's.
func kernelDirs() []string { return []string{"/proc", "/sys", "/dev"} }

// targetProblem returns what is wrong with where a directory is to be in the guest.
func (m Mount) targetProblem() string {
	const maxTarget = 1024
	switch {
	case !path.IsAbs(m.Target):
		return fmt.Sprintf("%q is not an absolute path in the guest", m.Target)
	case m.Target == "/":
		return "is the guest's root; give a directory below it"
	case len(m.Target) > maxTarget:
		return fmt.Sprintf("has %d bytes; at most %d are allowed", len(m.Target), maxTarget)
	case !utf8.ValidString(m.Target) || strings.ContainsRune(m.Target, 0):
		return "is not UTF-8, or has a NUL in it"
	}
	for _, dir := range kernelDirs() {
		if m.Target == dir || strings.HasPrefix(m.Target, dir+"/") {
			return fmt.Sprintf("%s belongs to the guest's kernel", dir)
		}
	}
	return ""
}

func (c VMConfig) validateMounts(v *validator) {
	v.check(len(c.Mounts) == 0 || c.UsesImage(), "mounts", "a VM with its own kernel has no agent to mount them")
	v.check(len(c.Mounts) <= MaxMounts, "mounts", "%d are too many; at most %d are allowed", len(c.Mounts), MaxMounts)
	for i, m := range c.Mounts {
		field := fmt.Sprintf("mounts[%d]", i)
		switch {
		case m.Source == "":
			v.add(field+".source", "is empty")
		case m.Source == "/":
			v.add(field+".source", "is the host's root, with the files of all its users and of smolvm; give a directory below it")
		case !utf8.ValidString(m.Source) || strings.ContainsRune(m.Source, 0) || !filepath.IsAbs(m.Source):
			v.add(field+".source", "is not UTF-8, which a VM's configuration has to be, or has a NUL in it")
		}
		problem := m.targetProblem()
		v.check(problem == "", field+".target", "%s", problem)
		switch m.Mode {
		case MountReadWrite, MountReadOnly, MountOverlay:
		default:
			v.add(field+".mode", "%q is not known; use rw, ro or overlay", m.Mode)
		}
		for _, other := range c.Mounts[:i] {
			v.check(other.Target != m.Target, field+".target", "%s is mounted twice", m.Target)
		}
	}
}
