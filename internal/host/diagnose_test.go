package host

import (
	"os"
	"slices"
	"strings"
	"testing"

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
			for name, text := range test.files {
				files[name] = text
			}
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
