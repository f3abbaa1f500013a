package host

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
)

// Program is a program that VMs need on the host.
type Program struct {
	// Names are alternatives, any one of which will do; the first is the one that
	// messages name.
	Names []string
	// MinVersion is the oldest version that works, as in "6.0". Empty: any.
	MinVersion string
	// Why says what needs it.
	Why string
	// Packages names the package that holds it, by package manager ("apt", "dnf",
	// "pacman", "apk", "zypper").
	Packages map[string]string
	// Get says how to get the program where no package has it, as a clause. Empty: one has.
	Get string
	// Optional programs make things better; VMs work without them.
	Optional bool
}

// commonPrograms returns the programs that VMs need whatever their backend.
func commonPrograms() []Program {
	return []Program{
		{
			Names:    []string{"mke2fs"},
			Why:      "makes the root file system of the default image",
			Packages: map[string]string{"apt": "e2fsprogs", "dnf": "e2fsprogs", "pacman": "e2fsprogs", "apk": "e2fsprogs", "zypper": "e2fsprogs"},
		},
		{
			Names:    []string{"ssh"},
			Why:      "logs in to VMs in `smolvm ssh`",
			Packages: map[string]string{"apt": "openssh-client", "dnf": "openssh-clients", "pacman": "openssh", "apk": "openssh-client", "zypper": "openssh-clients"},
			Optional: true,
		},
	}
}

// HasPrograms reports whether every program is there that is not optional. It runs
// none of them.
func HasPrograms(programs []Program) bool {
	return !slices.ContainsFunc(programs, func(p Program) bool { return !p.Optional && p.find() == "" })
}

// find returns the program's path, or nothing.
func (p Program) find() string {
	for _, name := range p.Names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
		// Some distributions keep system programs out of other users' PATH.
		for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
			if path, err := exec.LookPath(filepath.Join(dir, filepath.Base(name))); err == nil {
				return path
			}
		}
	}
	return ""
}

func (h *Host) checkProgram(ctx context.Context, p Program) smolvm.Finding {
	finding := smolvm.Finding{Name: p.Names[0], Severity: smolvm.SeverityError, Why: p.Why}
	if p.Optional {
		finding.Severity = smolvm.SeverityWarning
	}
	path := p.find()
	if path == "" {
		finding.Problem = "not installed"
		if len(p.Names) > 1 {
			finding.Problem += ", nor is " + strings.Join(p.Names[1:], " or ")
		}
		finding.Problem += p.get()
		finding.Fix = h.install(p.Packages)
		return finding
	}
	if p.MinVersion == "" {
		finding.Severity, finding.Problem = smolvm.SeverityOK, path
		return finding
	}
	got, err := versionOf(ctx, path)
	switch {
	case err != nil:
		finding.Problem = fmt.Sprintf("%s does not work: %v", path, err)
		finding.Fix = h.install(p.Packages)
	case got == "":
		finding.Severity = smolvm.SeverityWarning
		finding.Problem = fmt.Sprintf("%s does not tell its version; %s or later is needed", path, p.MinVersion)
	case older(got, p.MinVersion):
		finding.Problem = fmt.Sprintf("%s has version %s; %s or later is needed", path, got, p.MinVersion) + p.get()
		finding.Fix = h.install(p.Packages)
	default:
		finding.Severity, finding.Problem = smolvm.SeverityOK, fmt.Sprintf("version %s, %s", got, path)
	}
	return finding
}

// get is what is said of how to get the program, after what is wrong with it.
func (p Program) get() string {
	if p.Get == "" {
		return ""
	}
	return "; " + p.Get
}

// versionOf asks a program for its version.
func versionOf(ctx context.Context, path string) (string, error) {
	const patience = 5 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	// A program that leaves its output open to a child must not hold us up.
	cmd.WaitDelay = time.Second
	output, err := cmd.CombinedOutput()
	if err != nil {
		line, _, _ := strings.Cut(strings.TrimSpace(string(output)), "\n")
		return "", fmt.Errorf("%s --version: %w: %s", filepath.Base(path), err, line)
	}
	return parseVersion(string(output)), nil
}

// parseVersion returns the first thing in a text that looks like a version, as in
// "7.2.22", or nothing.
func parseVersion(text string) string {
	return regexp.MustCompile(`\d{1,9}(\.\d{1,9})+`).FindString(text)
}

// older compares versions number by number; a missing number is a zero.
func older(version, than string) bool {
	return slices.Compare(numbers(version), numbers(than)) < 0
}

func numbers(version string) []int {
	var all []int
	for word := range strings.SplitSeq(version, ".") {
		number, err := strconv.Atoi(word)
		if err != nil {
			break
		}
		all = append(all, number)
	}
	for len(all) > 0 && all[len(all)-1] == 0 {
		all = all[:len(all)-1]
	}
	return all
}
