package host

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

func TestMissingKVM(t *testing.T) {
	t.Parallel()
	const intel, amd = "processor\t: 0\nflags\t\t: fpu vmx sse\n", "flags\t\t: fpu svm\n"
	tests := map[string]struct {
		files        map[string]string
		problem, fix string
	}{
		"module not loaded, Intel": {map[string]string{"proc/cpuinfo": intel}, "module is not loaded", "sudo modprobe kvm_intel"},
		"module not loaded, AMD":   {map[string]string{"proc/cpuinfo": amd}, "module is not loaded", "sudo modprobe kvm_amd"},
		"container": {
			map[string]string{"proc/cpuinfo": intel, "proc/misc": " 60 rfkill\n232 kvm\n", ".dockerenv": ""},
			"this container has no /dev/kvm", withDevice,
		},
		"no node": {
			map[string]string{"proc/cpuinfo": intel, "proc/misc": "232 kvm\n"},
			"there is no /dev/kvm", "sudo mknod /dev/kvm c 10 232",
		},
		"VM":                {map[string]string{"proc/cpuinfo": "flags\t: fpu hypervisor\n"}, "nested virtualization", ""},
		"no virtualization": {map[string]string{"proc/cpuinfo": "flags\t: fpu\n"}, "firmware", ""},
		"not x86":           {map[string]string{"proc/cpuinfo": "Features\t: fp asimd\n"}, "kernel has no KVM", ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := newTestHost(t, test.files).checkKVM(t.Context(), Requirements{})
			if got.Severity != smolvm.SeverityWarning || !strings.Contains(got.Problem, test.problem) || got.Fix != test.fix {
				t.Errorf("got %+v\nwant %q, mended by %q", got, test.problem, test.fix)
			}
		})
	}
}

// What is wrong with a /dev/kvm that can be opened is told apart from one that is not there, or
// may not be opened, and so is what would mend it.
func TestBrokenKVM(t *testing.T) {
	t.Parallel()
	const vmCPU, cpu = "flags\t: fpu svm hypervisor\n", "flags\t: fpu vmx\n"
	for name, test := range map[string]struct {
		cpuinfo string
		speed   measured
		err     error
		problem []string
		fix     string
		works   bool
	}{
		"usable":            {cpu, measured{Exit: time.Microsecond}, nil, []string{"usable"}, "", true},
		"not measured":      {cpu, measured{}, nil, []string{"usable"}, "", true},
		"slow":              {vmCPU, measured{Exit: 2 * usualExit}, nil, []string{"usable, but slow", "50µs", "2.0 times longer"}, "", true},
		"too slow, in a VM": {vmCPU, measured{}, &slowError{1, 100}, []string{"not usable", "too slow", "1 %", "itself a VM", "nested virtualization is broken"}, "", false},
		"stuck, in a VM":    {vmCPU, measured{}, errStuck, []string{"not usable", "does not answer", "itself a VM"}, "", false},
		"stuck":             {cpu, measured{}, errStuck, []string{"not usable", "does not answer"}, "sudo modprobe -r kvm_intel && sudo modprobe kvm_intel", false},
		"taken":             {cpu, measured{}, fmt.Errorf("another hypervisor: %w", unix.EBUSY), []string{"not usable", "another hypervisor", "VirtualBox"}, "", false},
		"unknown CPU":       {"", measured{}, errStuck, []string{"not usable"}, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newTestHost(t, map[string]string{kvmDevice: "", bootID: "boot", "proc/cpuinfo": test.cpuinfo})
			h.probe = func(string, int, time.Duration) (measured, error) { return test.speed, test.err }
			for _, accelerators := range [][]string{{KVM, TCG}, {KVM}} {
				got := h.checkKVM(t.Context(), Requirements{Backend: "vmm", Accelerators: accelerators})
				severity := smolvm.SeverityOK
				if !test.works {
					severity = smolvm.SeverityWarning
					if len(accelerators) == 1 {
						severity = smolvm.SeverityError
					}
				}
				if got.Severity != severity || got.Fix != test.fix {
					t.Errorf("by %v: got %+v, want severity %s, mended by %q", accelerators, got, severity, test.fix)
				}
				for _, part := range test.problem {
					if !strings.Contains(got.Problem, part) {
						t.Errorf("problem is %q, without %q", got.Problem, part)
					}
				}
			}
		})
	}
}

// A program that no package has is got in the way that its backend tells.
func TestProgramToGet(t *testing.T) {
	t.Parallel()
	const get = "get a release from https://example.org/releases"
	findings := newTestHost(t, nil).Check(t.Context(), Requirements{Backend: "vmm", Programs: []Program{{Names: []string{"no-such-vmm"}, Why: "runs the VMs", Get: get}}})
	if got := findings[0]; got.Severity != smolvm.SeverityError || got.Problem != "not installed; "+get || got.Fix != "" {
		t.Errorf("got %+v", got)
	}
}

// That KVM is missing keeps only those backends from working that can't do without.
func TestNeededKVM(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		accelerators []string
		want         smolvm.Severity
	}{
		"nothing is said": {nil, smolvm.SeverityWarning},
		"one of two":      {[]string{KVM, TCG}, smolvm.SeverityWarning},
		"nothing else":    {[]string{KVM}, smolvm.SeverityError},
	} {
		h := newTestHost(t, nil)
		findings := h.Check(t.Context(), Requirements{Backend: "vmm", Accelerators: test.accelerators})
		i := slices.IndexFunc(findings, func(f smolvm.Finding) bool { return f.Name == KVM })
		if i < 0 || findings[i].Severity != test.want {
			t.Errorf("%s: found %+v, want severity %s", name, findings, test.want)
		}
		if h.Has(t.Context(), KVM) || !h.Has(t.Context(), TCG) || h.Has(t.Context(), "hvf") {
			t.Errorf("%s: a host without KVM has another accelerator than emulation", name)
		}
	}
}

func TestForbiddenKVM(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file to another group")
	}
	const passwd = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n"
	tests := map[string]struct {
		mode         os.FileMode
		group        int
		groups       []int
		files        map[string]string
		problem, fix string
	}{
		"not in the group": {
			mode: 0o660, group: 104,
			files:   map[string]string{"etc/group": "kvm:x:104:bob\n", "etc/passwd": passwd},
			problem: "for group kvm", fix: "sudo usermod -aG kvm alice && newgrp kvm",
		},
		"not in the group yet": {
			mode: 0o660, group: 104,
			files:   map[string]string{"etc/group": "kvm:x:104:bob,alice\n", "etc/passwd": passwd},
			problem: "this session began before", fix: "newgrp kvm",
		},
		"user and group of a directory service": {
			mode: 0o660, group: 104,
			problem: "for group 104", fix: "sudo usermod -aG 104 $USER && newgrp 104",
		},
		"for root only":    {mode: 0o600, group: 0, problem: "mode is 0600", fix: "sudo chmod 666 /dev/kvm"},
		"for root's group": {mode: 0o660, group: 0, problem: "mode is 0660", fix: "sudo chmod 666 /dev/kvm"},
		"group may read":   {mode: 0o640, group: 104, problem: "mode is 0640", fix: "sudo chmod 666 /dev/kvm"},
		"container's policy": {
			mode: 0o660, group: 104, groups: []int{104},
			files:   map[string]string{"run/.containerenv": ""},
			problem: "this container may not", fix: withDevice,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			files := map[string]string{kvmDevice: ""}
			maps.Copy(files, test.files)
			h := newTestHost(t, files)
			h.groups = append(h.groups, test.groups...)
			if err := os.Chown(h.path(kvmDevice), 0, test.group); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(h.path(kvmDevice), test.mode); err != nil {
				t.Fatal(err)
			}
			problem, fix := h.forbiddenKVM()
			if !strings.Contains(problem, test.problem) || fix != test.fix {
				t.Errorf("got %q, mended by %q\nwant %q, mended by %q", problem, fix, test.problem, test.fix)
			}
		})
	}
}

func TestNestedProblem(t *testing.T) {
	t.Parallel()
	const intel, amd = "sys/module/kvm_intel/parameters/nested", "sys/module/kvm_amd/parameters/nested"
	for name, test := range map[string]struct {
		files        map[string]string
		accelerator  string
		problem, fix string
	}{
		"emulated":  {nil, TCG, "", ""},
		"Intel":     {map[string]string{intel: "Y\n"}, KVM, "", ""},
		"AMD":       {map[string]string{amd: "1\n"}, KVM, "", ""},
		"Intel off": {map[string]string{intel: "N\n"}, KVM, "does not pass", "kvm_intel nested=1"},
		"AMD off":   {map[string]string{amd: "0\n"}, KVM, "does not pass", "kvm_amd nested=1"},
		"unknown":   {nil, KVM, "does not say", ""},
	} {
		problem, fix := newTestHost(t, test.files).NestedProblem(test.accelerator)
		if (problem == "") != (test.problem == "") || !strings.Contains(problem, test.problem) || !strings.Contains(fix, test.fix) {
			t.Errorf("%s: %q, mended by %q", name, problem, fix)
		}
	}
}
