package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/diskspace"
	"github.com/smolvm/smolvm/internal/namespace"
)

// Requirements is what is to be checked.
type Requirements struct {
	// Backend that needs Programs.
	Backend  string
	Programs []Program
	// Accelerators that Backend can run VMs on, of which the host must have one. Empty: it
	// does without.
	Accelerators []string
	// DataDir is where VMs keep their disks; it need not be there yet. Empty: its
	// free space is not checked.
	DataDir string
	// Launcher is the program that launches VMMs in namespaces of their own, as
	// [namespace.Options] has it. Empty: none is launched so.
	Launcher []string
	// CopiesDisks says that VMs have disks that are copies, and no overlays.
	CopiesDisks bool
}

// Check looks at everything that VMs need of this host. It reports each finding,
// the good ones too. KVM is probed afresh, and what is found holds for
// [Host.Accelerator] from then on.
func (h *Host) Check(ctx context.Context, needed Requirements) []smolvm.Finding {
	var findings []smolvm.Finding
	for _, program := range needed.Programs {
		program.Why = "backend " + needed.Backend + ": " + program.Why
		findings = append(findings, h.checkProgram(ctx, program))
	}
	for _, program := range commonPrograms() {
		findings = append(findings, h.checkProgram(ctx, program))
	}
	findings = append(findings, h.checkKVM(ctx, needed), h.checkMemory(), h.checkLimits())
	if len(needed.Launcher) > 0 {
		findings = append(findings, checkNamespaces(ctx, needed))
	}
	if needed.DataDir != "" {
		findings = append(findings, checkSpace(needed.DataDir))
	}
	if needed.DataDir != "" && needed.CopiesDisks {
		findings = append(findings, checkCopies(needed.DataDir, needed.Backend))
	}
	return findings
}

// The sizes, in bytes, below which there is a warning. A VM of the default size has 512 MiB of memory,
// and QEMU takes some 60 MiB for itself; a root drive takes what the guest writes.
const (
	lowMemory = 768 << 20
	lowSpace  = 1 << 30
)

func (h *Host) checkMemory() smolvm.Finding {
	finding := smolvm.Finding{Name: "memory", Severity: smolvm.SeverityOK, Why: "a VM's memory is the host's"}
	available, ok := availableMemory(h.read("proc/meminfo"))
	switch {
	case !ok:
		finding.Severity = smolvm.SeverityWarning
		finding.Problem = "how much is available can't be read from /proc/meminfo"
	case available < lowMemory:
		finding.Severity = smolvm.SeverityWarning
		finding.Problem = fmt.Sprintf("only %s are available: end other programs, or give VMs less than the default 512 MiB", mebibytes(available))
	default:
		finding.Problem = mebibytes(available) + " are available"
	}
	return finding
}

// availableMemory reads the bytes that can be used without swapping; see proc(5).
func availableMemory(meminfo string) (bytes uint64, ok bool) {
	for line := range strings.Lines(meminfo) {
		value, found := strings.CutPrefix(line, "MemAvailable:")
		if !found {
			continue
		}
		kibibytes, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 54)
		return kibibytes << 10, err == nil
	}
	return 0, false
}

// checkSpace looks at the file system that holds dir, or is to hold it.
func checkSpace(dir string) smolvm.Finding {
	finding := smolvm.Finding{Name: "disk space", Severity: smolvm.SeverityOK, Why: "holds images and the disks of VMs"}
	at := dir
	free, _, err := diskspace.Of(at)
	for errors.Is(err, fs.ErrNotExist) && at != filepath.Dir(at) {
		at = filepath.Dir(at)
		free, _, err = diskspace.Of(at)
	}
	switch {
	case err != nil:
		finding.Severity = smolvm.SeverityWarning
		finding.Problem = err.Error()
	case free < lowSpace:
		finding.Severity = smolvm.SeverityWarning
		finding.Problem = fmt.Sprintf("only %s are free in %s: remove VMs and images, or use another data directory", mebibytes(uint64(free)), dir)
	default:
		finding.Problem = fmt.Sprintf("%s are free in %s", mebibytes(uint64(free)), dir)
	}
	return finding
}

// checkNamespaces looks whether a VMM can be given a network in namespaces of its own.
func checkNamespaces(ctx context.Context, needed Requirements) smolvm.Finding {
	finding := smolvm.Finding{
		Name: "namespaces", Severity: smolvm.SeverityOK, Problem: "a VM's network can be made by this user",
		Why: "backend " + needed.Backend + ": a VM with a network has it in namespaces of its own",
	}
	err := namespace.Check(ctx, needed.Launcher)
	if err == nil {
		return finding
	}
	finding.Severity, finding.Problem = smolvm.SeverityWarning, "no VM with a network starts: "+err.Error()
	if known, ok := errors.AsType[*smolvm.Error](err); ok {
		finding.Fix = known.Hint
	}
	return finding
}

// checkCopies looks whether copies of disks share blocks on the file system that holds dir, or
// is to hold it.
func checkCopies(dir, backend string) smolvm.Finding {
	finding := smolvm.Finding{
		Name: "copies of disks", Severity: smolvm.SeverityOK,
		Why: "backend " + backend + " has no overlays: each VM, fork and snapshot has a copy of a disk",
	}
	at := dir
	for _, err := os.Stat(at); errors.Is(err, fs.ErrNotExist) && at != filepath.Dir(at); _, err = os.Stat(at) {
		at = filepath.Dir(at)
	}
	if disk.Shares(at) {
		finding.Problem = "they share blocks in " + dir
		return finding
	}
	finding.Severity = smolvm.SeverityWarning
	finding.Problem = fmt.Sprintf("the file system of %s can't share blocks: a start, a fork and a snapshot copy all that a disk holds, "+
		"some milliseconds for a new disk and about half a second for each GiB more", dir)
	finding.Fix = "put the data directory ($SMOLVM_DATA_DIR) on XFS or btrfs"
	return finding
}

func mebibytes(bytes uint64) string { return fmt.Sprintf("%d MiB", bytes>>20) }
