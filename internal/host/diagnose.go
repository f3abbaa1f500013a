package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

// checkKVM probes KVM, and finds out what would fix it. That it is missing is an error only
// for a backend that can't do without.
func (h *Host) checkKVM(ctx context.Context, needed Requirements) smolvm.Finding {
	finding := smolvm.Finding{
		Name:     "kvm",
		Severity: smolvm.SeverityOK,
		Problem:  "usable",
		Why:      "runs VMs on the processor itself; without it they are emulated, and several times slower",
	}
	speed, problem := h.probeKVM(ctx, false)
	if slow := speed.slowness(); problem == nil && slow > 1 {
		finding.Problem = fmt.Sprintf("usable, but slow: a test loop takes %s, and leaving a guest %s; VMs get %.1f times longer to boot",
			speed.Loop.Round(time.Microsecond), speed.Exit.Round(time.Microsecond), slow)
	}
	if problem == nil {
		return finding
	}
	finding.Severity, finding.Problem = smolvm.SeverityWarning, problem.Error()
	if len(needed.Accelerators) > 0 && !slices.Contains(needed.Accelerators, TCG) {
		finding.Severity, finding.Why = smolvm.SeverityError, "backend "+needed.Backend+": runs the VMs"
	}
	switch {
	case errors.Is(problem, fs.ErrNotExist):
		finding.Problem, finding.Fix = h.missingKVM()
	case errors.Is(problem, fs.ErrPermission):
		finding.Problem, finding.Fix = h.forbiddenKVM()
	default:
		finding.Problem, finding.Fix = h.brokenKVM(problem)
	}
	return finding
}

const withDevice = "start the container with --device /dev/kvm"

// missingKVM says why there is no /dev/kvm.
func (h *Host) missingKVM() (problem, fix string) {
	flags := cpuFlags(h.read("proc/cpuinfo"))
	has := func(flag string) bool { return slices.Contains(flags, flag) }
	switch {
	case hasMisc(h.read("proc/misc"), "kvm") && h.inContainer():
		return "the host has KVM, but this container has no /dev/kvm", withDevice
	case hasMisc(h.read("proc/misc"), "kvm"):
		return "the kernel has KVM, but there is no /dev/kvm", h.sudo("mknod /dev/kvm c 10 232")
	case kvmModule(flags) != "":
		return "no /dev/kvm: its kernel module is not loaded (if it can't be, the firmware's settings have virtualization switched off)",
			h.sudo("modprobe " + kvmModule(flags))
	case has("hypervisor"):
		return "no /dev/kvm: this host is itself a VM, and its provider has not enabled nested virtualization", ""
	case len(flags) > 0:
		return "no /dev/kvm: the processor has no virtualization, or the firmware's settings have it switched off", ""
	default:
		return "no /dev/kvm: the kernel has no KVM", ""
	}
}

// kvmModule returns the kernel module that makes KVM of a processor's virtualization; empty if
// that has none.
func kvmModule(flags []string) string {
	switch {
	case slices.Contains(flags, "vmx"):
		return "kvm_intel"
	case slices.Contains(flags, "svm"):
		return "kvm_amd"
	}
	return ""
}

// brokenKVM says why a /dev/kvm that this user may open can't be used.
func (h *Host) brokenKVM(cause error) (problem, fix string) {
	flags := cpuFlags(h.read("proc/cpuinfo"))
	problem = "not usable: " + cause.Error()
	switch module := kvmModule(flags); {
	case errors.Is(cause, unix.EBUSY):
		return problem + "; end the other one (VirtualBox, VMware), or unload its kernel modules", ""
	case slices.Contains(flags, "hypervisor"):
		return problem + "; this host is itself a VM, whose nested virtualization is broken: " +
			"ask its provider for a host that has it, or use the machine below it", ""
	case module != "":
		return problem, fmt.Sprintf("%s && %s", h.sudo("modprobe -r "+module), h.sudo("modprobe "+module))
	}
	return problem, ""
}

// forbiddenKVM says why this user may not open /dev/kvm.
func (h *Host) forbiddenKVM() (problem, fix string) {
	const forbidden = "this user may not open /dev/kvm"
	var stat unix.Stat_t
	if err := unix.Stat(h.path(kvmDevice), &stat); err != nil {
		return fmt.Sprintf("%s: %v", forbidden, err), ""
	}
	const groupUses = unix.S_IRGRP | unix.S_IWGRP
	byGroup := stat.Mode&groupUses == groupUses && stat.Gid != 0
	member := slices.Contains(h.groups, int(stat.Gid))
	switch {
	case h.inContainer() && (h.uid == 0 || byGroup && member):
		return "this container may not open /dev/kvm", withDevice
	case !byGroup || member:
		return fmt.Sprintf("%s: its mode is %#o", forbidden, stat.Mode&0o777), h.sudo("chmod 666 /dev/kvm")
	}
	groups := h.read("etc/group")
	group := cmp.Or(nameOf(groups, int(stat.Gid)), strconv.Itoa(int(stat.Gid)))
	// A user of a directory service is not in the file; the shell knows the name.
	name := cmp.Or(nameOf(h.read("etc/passwd"), h.uid), "$USER")
	if hasMember(groups, group, name) {
		return fmt.Sprintf("%s: user %s is in group %s, but this session began before that", forbidden, name, group),
			"newgrp " + group
	}
	return fmt.Sprintf("%s: it is for group %s", forbidden, group),
		fmt.Sprintf("%s && newgrp %s", h.sudo(fmt.Sprintf("usermod -aG %s %s", group, name)), group)
}

// inContainer reports whether this process runs in a container of one of the usual
// kinds.
func (h *Host) inContainer() bool {
	// Docker, Podman, and what follows systemd's container interface.
	return slices.ContainsFunc([]string{".dockerenv", "run/.containerenv", "run/systemd/container"}, func(name string) bool {
		return unix.Access(h.path(name), unix.F_OK) == nil
	})
}

// cpuFlags returns the features of the first processor in /proc/cpuinfo. Only x86
// calls them flags.
func cpuFlags(cpuinfo string) []string {
	for line := range strings.Lines(cpuinfo) {
		if name, value, found := strings.Cut(line, ":"); found && strings.TrimSpace(name) == "flags" {
			return strings.Fields(value)
		}
	}
	return nil
}

// hasMisc reports whether /proc/misc, the list of the kernel's odd devices, has one.
// A container sees the host's.
func hasMisc(misc, device string) bool {
	for line := range strings.Lines(misc) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[1] == device {
			return true
		}
	}
	return false
}

// hasMember reports whether a user has been added to a group; see group(5).
func hasMember(groups, group, name string) bool {
	for line := range strings.Lines(groups) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) == 4 && fields[0] == group {
			return slices.Contains(strings.Split(fields[3], ","), name)
		}
	}
	return false
}

// nameOf finds the name of a number in /etc/passwd or /etc/group, or returns
// nothing; see passwd(5) and group(5).
func nameOf(text string, id int) string {
	for line := range strings.Lines(text) {
		if fields := strings.Split(line, ":"); len(fields) >= 4 && fields[2] == strconv.Itoa(id) {
			return fields[0]
		}
	}
	return ""
}
