package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
)

const (
	debian = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\n"
	mint   = "ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"
)

func TestPackageManager(t *testing.T) {
	t.Parallel()
	for osRelease, want := range map[string]string{
		debian:                               "apt",
		mint:                                 "apt",
		"ID=ubuntu\nID_LIKE=debian\n":        "apt",
		"NAME=\"Fedora Linux\"\nID=fedora\n": "dnf",
		"ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n": "dnf",
		"ID=arch\n":                "pacman",
		"ID=manjaro\nID_LIKE=arch": "pacman",
		"ID=alpine":                "apk",
		"ID='opensuse-tumbleweed'\nID_LIKE='opensuse suse'\n": "zypper",
		"ID=nixos\n":          "",
		"VARIANT_ID=debian\n": "",
		"":                    "",
	} {
		if got := packageManager(osRelease); got != want {
			t.Errorf("packageManager(%q) = %q, want %q", osRelease, got, want)
		}
	}
}

func TestInstall(t *testing.T) {
	t.Parallel()
	packages := map[string]string{"apt": "qemu-system-x86", "dnf": "qemu-system-x86-core", "apk": "qemu-system-x86_64"}
	for _, test := range []struct {
		osRelease, want string
		uid             int
	}{
		{debian, "sudo apt-get update && sudo apt-get install -y --no-install-recommends qemu-system-x86", 1000},
		{debian, "apt-get update && apt-get install -y --no-install-recommends qemu-system-x86", 0},
		{"ID=fedora", "sudo dnf install -y qemu-system-x86-core", 1000},
		{"ID=alpine", "apk add qemu-system-x86_64", 0},
		{"ID=arch", "", 0}, // not in packages
		{"ID=nixos", "", 0},
	} {
		h := newTestHost(t, map[string]string{"etc/os-release": test.osRelease})
		h.uid = test.uid
		if got := h.install(packages); got != test.want {
			t.Errorf("install on %q as %d = %q, want %q", test.osRelease, test.uid, got, test.want)
		}
	}
}

func TestVersions(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022": "7.2.22",
		"Firecracker v1.10.1\n": "1.10.1",
		"no numbers":            "",
		"year 2022":             "",
	} {
		if got := parseVersion(text); got != want {
			t.Errorf("parseVersion(%q) = %q, want %q", text, got, want)
		}
	}
	for _, test := range []struct {
		version, than string
		want          bool
	}{
		{"5.2.0", "6.0", true},
		{"6.0", "6.0", false},
		{"6.0.0", "6.0", false},
		{"6", "6.0.1", true},
		{"10.0.0", "6.0", false},
		{"7.2.22", "7.10", true},
	} {
		if got := older(test.version, test.than); got != test.want {
			t.Errorf("older(%q, %q) = %v", test.version, test.than, got)
		}
	}
}

// script puts a program into dir.
func script(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text), 0o700); err != nil {
		t.Fatal(err)
	}
}

func TestCheckProgram(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	script(t, dir, "vmm-old", "echo vmm 5.2.0")
	script(t, dir, "vmm-new", "echo vmm 6.1")
	script(t, dir, "vmm-mute", "exit 0")
	script(t, dir, "vmm-broken", "echo libfoo.so is missing >&2; exit 127")
	h := newTestHost(t, map[string]string{"etc/os-release": debian})
	const fix = "sudo apt-get update && sudo apt-get install -y --no-install-recommends vmm"

	tests := map[string]struct {
		program Program
		want    smolvm.Finding
	}{
		"new enough": {
			Program{Names: []string{"vmm-new"}, MinVersion: "6.0"},
			smolvm.Finding{Name: "vmm-new", Severity: smolvm.SeverityOK, Problem: "version 6.1, DIR/vmm-new"},
		},
		"any version": {
			Program{Names: []string{"vmm-broken"}},
			smolvm.Finding{Name: "vmm-broken", Severity: smolvm.SeverityOK, Problem: "DIR/vmm-broken"},
		},
		"the second name will do": {
			Program{Names: []string{"vmm", "vmm-new"}},
			smolvm.Finding{Name: "vmm", Severity: smolvm.SeverityOK, Problem: "DIR/vmm-new"},
		},
		"too old": {
			Program{Names: []string{"vmm-old"}, MinVersion: "6.0"},
			smolvm.Finding{Name: "vmm-old", Severity: smolvm.SeverityError, Problem: "DIR/vmm-old has version 5.2.0; 6.0 or later is needed", Fix: fix},
		},
		"version unknown": {
			Program{Names: []string{"vmm-mute"}, MinVersion: "6.0"},
			smolvm.Finding{Name: "vmm-mute", Severity: smolvm.SeverityWarning, Problem: "DIR/vmm-mute does not tell its version; 6.0 or later is needed"},
		},
		"broken": {
			Program{Names: []string{"vmm-broken"}, MinVersion: "6.0"},
			smolvm.Finding{Name: "vmm-broken", Severity: smolvm.SeverityError, Problem: "DIR/vmm-broken does not work: vmm-broken --version: exit status 127: libfoo.so is missing", Fix: fix},
		},
		"missing": {
			Program{Names: []string{"vmm-x", "vmm-y"}, Why: "runs the VMs"},
			smolvm.Finding{Name: "vmm-x", Severity: smolvm.SeverityError, Problem: "not installed, nor is vmm-y", Why: "runs the VMs", Fix: fix},
		},
		"missing and optional": {
			Program{Names: []string{"vmm-x"}, Optional: true},
			smolvm.Finding{Name: "vmm-x", Severity: smolvm.SeverityWarning, Problem: "not installed", Fix: fix},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			test.program.Packages = map[string]string{"apt": "vmm"}
			test.want.Problem = strings.ReplaceAll(test.want.Problem, "DIR", dir)
			if got := h.checkProgram(t.Context(), test.program); got != test.want {
				t.Errorf("got  %+v\nwant %+v", got, test.want)
			}
		})
	}
}

func TestHasPrograms(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	script(t, dir, "vmm", "touch "+filepath.Join(dir, "was-run"))
	for _, test := range []struct {
		programs []Program
		want     bool
	}{
		{nil, true},
		{[]Program{{Names: []string{"vmm"}, MinVersion: "1.0"}}, true},
		{[]Program{{Names: []string{"another-vmm", "vmm"}}}, true},
		{[]Program{{Names: []string{"vmm"}}, {Names: []string{"another-vmm"}}}, false},
		{[]Program{{Names: []string{"another-vmm"}, Optional: true}}, true},
	} {
		if got := HasPrograms(test.programs); got != test.want {
			t.Errorf("HasPrograms(%+v) = %v", test.programs, got)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "was-run")); err == nil {
		t.Error("HasPrograms runs programs")
	}
}

func TestCheckMemory(t *testing.T) {
	t.Parallel()
	for meminfo, want := range map[string]smolvm.Severity{
		"MemTotal:  8000000 kB\nMemAvailable:    4000000 kB\n": smolvm.SeverityOK,
		"MemTotal:  8000000 kB\nMemAvailable:     400000 kB\n": smolvm.SeverityWarning,
		"MemTotal:  8000000 kB\nMemAvailable:     many kB\n":   smolvm.SeverityWarning,
		"": smolvm.SeverityWarning,
	} {
		h := newTestHost(t, map[string]string{"proc/meminfo": meminfo})
		if got := h.checkMemory(); got.Severity != want {
			t.Errorf("checkMemory of %q = %v, want severity %s", meminfo, got, want)
		}
	}
}

func TestCheckSpace(t *testing.T) {
	t.Parallel()
	there := checkSpace(t.TempDir())
	if !strings.Contains(there.Problem, "free in") {
		t.Errorf("checkSpace = %v", there)
	}
	// A data directory is made when it is needed first.
	if later := checkSpace(filepath.Join(t.TempDir(), "not", "yet")); later.Severity != there.Severity {
		t.Errorf("checkSpace of a directory to come = %v", later)
	}
}

// A user gets to see every finding, each complete.
func TestCheckThisHost(t *testing.T) {
	t.Parallel()
	h := New(Options{CacheDir: t.TempDir()})
	needed := Requirements{
		Backend:  "test",
		Programs: []Program{{Names: []string{"no-such-vmm"}, MinVersion: "1.0", Why: "runs the VMs"}},
		DataDir:  t.TempDir(),

		CopiesDisks: true,
	}
	var names []string
	for _, finding := range h.Check(t.Context(), needed) {
		t.Log(finding)
		names = append(names, finding.Name)
		if finding.Problem == "" || finding.Why == "" || finding.Severity == "" {
			t.Errorf("finding is not complete: %+v", finding)
		}
		if finding.Severity == smolvm.SeverityOK && finding.Fix != "" {
			t.Errorf("finding mends what is well: %+v", finding)
		}
	}
	if got, want := fmt.Sprint(names), "[no-such-vmm mke2fs ssh kvm memory limits disk space copies of disks]"; got != want {
		t.Errorf("Check looked at %s, want %s", got, want)
	}
}

// A host where no namespaces can be made hears so, and what to do. Here it is the launcher that is
// none.
func TestCheckNamespaces(t *testing.T) {
	t.Parallel()
	got := checkNamespaces(t.Context(), Requirements{Backend: "fake", Launcher: []string{"/bin/true"}})
	if got.Severity != smolvm.SeverityWarning || !strings.Contains(got.Fix, "shim.Main") || !strings.HasPrefix(got.Problem, "no VM with a network starts: ") {
		t.Errorf("of a program that is no launcher: %+v", got)
	}
}
