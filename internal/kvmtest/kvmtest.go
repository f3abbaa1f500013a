// Package kvmtest runs tests that need KVM, also on hosts where that does not work: in a VM of
// smolvm's own, the outer machine, whose emulated CPU has virtualization, so that its kernel
// has a KVM that works. Tests run there as they are: their packages' test binaries are built
// on the host, and each test is reported as a subtest of the host's.
//
// The outer machine has what tests of VMMs need: QEMU, Firecracker, control groups, TAPs,
// vsock, nftables, user namespaces, and the default image. It has no Go toolchain, and no
// network but its own.
package kvmtest

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"
)

// Job is one run of a package's tests.
type Job struct {
	// Package is the path of the package below the module, as in "internal/vmm/qemu".
	Package string
	// What tells the job from others of its package, for people. Empty: it is the only one.
	What string
	// Needs lists the programs without which the job is left out, as in "firecracker".
	Needs []string
	// Flags are those of the test binary, without "test." in their names, as in
	// "-run=TestX".
	Flags []string
	// AsUser runs the tests as an ordinary user, who may open /dev/kvm. Otherwise root does.
	AsUser bool
	// Timeout bounds the job. Zero: [DefaultTimeout].
	Timeout time.Duration
	// MaySkip lists the tests that may be skipped, by their whole names or, with a star at
	// the end, by what these begin with. Any other that is skipped fails: it would run
	// nowhere.
	MaySkip []string
}

// toolsDir is where scripts/install-deps.sh puts programs, below the module.
const toolsDir = "bin/tools"

// DefaultTimeout bounds a [Job] that does not say otherwise. It is long as jobs take ten times
// longer on a busy host; only a defect makes one use it up.
const DefaultTimeout = 25 * time.Minute

// Name returns what tells the job from others, for people.
func (j Job) Name() string {
	name := j.Package
	if j.What != "" {
		name += " " + j.What
	}
	if j.AsUser {
		name += " as a user"
	}
	return name
}

// Lacks returns the first of the programs that the job needs that this host does not have, neither
// in PATH nor among the tools of the module. Empty: it has all.
func (j Job) Lacks(module string) string {
	for _, program := range j.Needs {
		if _, err := find(program, filepath.Join(module, toolsDir)); err != nil {
			return program
		}
	}
	return ""
}

func (j Job) timeout() time.Duration {
	if j.Timeout > 0 {
		return j.Timeout
	}
	return DefaultTimeout
}

// arguments are those of the test binary.
func (j Job) arguments() []string {
	// One test at a time: each runs a VM or two, and most have deadlines.
	args := []string{"-test.v=test2json", "-test.paniconexit0", "-test.parallel=1", "-test.timeout=" + j.timeout().String()}
	for _, flag := range j.Flags {
		args = append(args, "-test."+strings.TrimLeft(flag, "-"))
	}
	return args
}

// maySkip reports whether a test may be skipped.
func (j Job) maySkip(test string) bool {
	for _, allowed := range j.MaySkip {
		if start, all := strings.CutSuffix(allowed, "*"); test == allowed || all && strings.HasPrefix(test, start) {
			return true
		}
	}
	return false
}

// ParseJob reads a job as people write it: a package, and flags of its test binary, as in
// "./internal/vmm/qemu -run 'TestConformance/q35 on KVM' -user". The flag -user stands for
// AsUser. What is within quotes is one word.
func ParseJob(line string) (Job, error) {
	words, err := split(line)
	if err != nil {
		return Job{}, err
	}
	if len(words) == 0 || strings.HasPrefix(words[0], "-") {
		return Job{}, fmt.Errorf("job %q: it begins with no package", line)
	}
	job := Job{Package: strings.Trim(strings.TrimPrefix(words[0], "./"), "/"), MaySkip: []string{"*"}}
	for _, word := range words[1:] {
		switch last := len(job.Flags) - 1; {
		case word == "-user" || word == "--user":
			job.AsUser = true
		case strings.HasPrefix(word, "-"):
			job.Flags = append(job.Flags, word)
		case last < 0 || strings.Contains(job.Flags[last], "="):
			return Job{}, fmt.Errorf("job %q: %q is no flag, and no flag's value", line, word)
		default:
			job.Flags[last] += "=" + word
		}
	}
	for _, flag := range job.Flags {
		name, value, _ := strings.Cut(strings.TrimLeft(flag, "-"), "=")
		if name != "timeout" {
			continue
		}
		if job.Timeout, err = time.ParseDuration(value); err != nil {
			return Job{}, fmt.Errorf("job %q: %w", line, err)
		}
	}
	return job, nil
}

// split splits a line at its blanks, but for those within quotes.
func split(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	var quote rune
	within := false
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '\'' || r == '"':
			quote, within = r, true
		case r == ' ' || r == '\t' || r == '\n':
			if within {
				words = append(words, word.String())
				word.Reset()
			}
			within = false
		default:
			word.WriteRune(r)
			within = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("job %q: a quote is not closed", line)
	}
	if within {
		words = append(words, word.String())
	}
	return words, nil
}
