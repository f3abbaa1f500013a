package host

import (
	"testing"

	"github.com/smolvm/smolvm"
)

func TestCheckLimits(t *testing.T) {
	t.Parallel()
	const (
		mount   = "31 24 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
		systemd = "run/systemd/system"
	)
	v2 := func(has, procs string) map[string]string {
		return map[string]string{
			"proc/self/mountinfo": mount, "proc/self/cgroup": "0::/\n",
			"sys/fs/cgroup/cgroup.type": "domain\n", "sys/fs/cgroup/cgroup.controllers": has + "\n",
			"sys/fs/cgroup/cgroup.subtree_control": "", "sys/fs/cgroup/cgroup.procs": procs,
		}
	}
	for name, test := range map[string]struct {
		files    map[string]string
		severity smolvm.Severity
		problem  string
	}{
		"all": {v2("cpu memory pids", ""), smolvm.SeverityOK, "cgroup v2 bounds memory, tasks, CPU time; the VMM bounds the speed of disks"},
		"no CPU time": {
			v2("memory pids", ""), smolvm.SeverityWarning,
			"cgroup v2 bounds memory, tasks; the VMM bounds the speed of disks; not CPU time: this kernel, or the group that this process is in, does not have it",
		},
		"a container": {
			v2("cpu memory pids", "1\n"), smolvm.SeverityWarning,
			"only rlimits, which are coarse, bound VMs, and --cpus can't be used (--disk-bps and --disk-iops can): the control group that this process is in can't be divided",
		},
		"none": {
			map[string]string{systemd: ""}, smolvm.SeverityWarning,
			"only rlimits, which are coarse, bound VMs, and --cpus can't be used (--disk-bps and --disk-iops can): no control groups are mounted",
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := newTestHost(t, test.files).checkLimits()
			if got.Severity != test.severity || got.Problem != test.problem || got.Fix != "" {
				t.Errorf("finding is %+v", got)
			}
		})
	}
}
