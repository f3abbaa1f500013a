package host

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/cgroup"
)

// checkLimits finds out what bounds VMs in what they take of this host.
func (h *Host) checkLimits() smolvm.Finding {
	site := cgroup.Find(h.root)
	finding := smolvm.Finding{
		Name:     "limits",
		Severity: smolvm.SeverityOK,
		Why:      "keeps a VM that breaks out of its bounds from taking the host's memory and processors",
	}
	var bounded, missing []string
	for _, controller := range []struct{ name, words string }{
		{cgroup.Memory, "memory"}, {cgroup.PIDs, "tasks"}, {cgroup.CPU, "CPU time"},
	} {
		if why := site.Why(controller.name); why != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", controller.words, why))
		} else {
			bounded = append(bounded, controller.words)
		}
	}
	if len(bounded) > 0 {
		finding.Problem = fmt.Sprintf("%s bounds %s; the VMM bounds the speed of disks", site.Version(), strings.Join(bounded, ", "))
	}
	if len(missing) == 0 {
		return finding
	}
	finding.Severity = smolvm.SeverityWarning
	if len(bounded) == 0 {
		finding.Problem = fmt.Sprintf("only rlimits, which are coarse, bound VMs, and --cpus can't be used (--disk-bps and --disk-iops can): %v", site.Why(cgroup.Memory))
	} else {
		finding.Problem += "; not " + strings.Join(missing, "; ")
	}
	if h.uid != 0 && unix.Access(h.path("run/systemd/system"), unix.F_OK) == nil && errors.Is(site.Why(cgroup.Memory), cgroup.ErrNoAccess) {
		finding.Fix = "systemd-run --user --scope --property=Delegate=yes $SHELL # and start VMs from there"
	}
	return finding
}
