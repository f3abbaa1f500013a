package kvmtest

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseJob(t *testing.T) {
	t.Parallel()
	all := []string{"*"}
	for _, test := range []struct {
		line, problem string
		want          Job
	}{
		{line: "./internal/vmm/qemu", want: Job{Package: "internal/vmm/qemu", MaySkip: all}},
		{line: " internal/vmm/qemu/\n", want: Job{Package: "internal/vmm/qemu", MaySkip: all}},
		{
			line: `./a -run 'TestX/q35 on KVM' -user -count=2 --short`,
			want: Job{Package: "a", AsUser: true, Flags: []string{"-run=TestX/q35 on KVM", "-count=2", "--short"}, MaySkip: all},
		},
		{line: `a -run "it's"`, want: Job{Package: "a", Flags: []string{"-run=it's"}, MaySkip: all}},
		{line: `a -run ''`, want: Job{Package: "a", Flags: []string{"-run="}, MaySkip: all}},
		{line: `a -timeout 20m`, want: Job{Package: "a", Flags: []string{"-timeout=20m"}, Timeout: 20 * time.Minute, MaySkip: all}},
		{line: "", problem: "no package"},
		{line: "-run X", problem: "no package"},
		{line: "a b", problem: `"b" is no flag`},
		{line: "a -count=1 b", problem: `"b" is no flag`},
		{line: "a -run 'X", problem: "quote"},
		{line: "a -timeout soon", problem: "soon"},
	} {
		got, err := ParseJob(test.line)
		if test.problem != "" {
			if err == nil || !strings.Contains(err.Error(), test.problem) {
				t.Errorf("ParseJob(%q) fails with %v, want %q", test.line, err, test.problem)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got, test.want) {
			t.Errorf("ParseJob(%q) = %+v, %v, want %+v", test.line, got, err, test.want)
		}
	}
}

func TestArguments(t *testing.T) {
	t.Parallel()
	got := Job{Flags: []string{"-run=^X$", "--count=2"}, Timeout: time.Minute}.arguments()
	want := []string{"-test.v=test2json", "-test.paniconexit0", "-test.parallel=1", "-test.timeout=1m0s", "-test.run=^X$", "-test.count=2"}
	if !slices.Equal(got, want) {
		t.Errorf("arguments are %q, want %q", got, want)
	}
}

func TestMaySkip(t *testing.T) {
	t.Parallel()
	job := Job{MaySkip: []string{"TestA", "TestB/*"}}
	for test, want := range map[string]bool{"TestA": true, "TestA/x": false, "TestB/x": true, "TestB": false, "TestC": false} {
		if job.maySkip(test) != want {
			t.Errorf("%s may be skipped: %v, want %v", test, !want, want)
		}
	}
}

// roleEnv makes TestReport what its value says.
const roleEnv = "SMOLVM_KVMTEST_ROLE"

// The tests of a binary are reported with their names, logs and results, whichever way they
// end. The one that reports has to fail, so it is another process.
func TestReport(t *testing.T) {
	switch role := os.Getenv(roleEnv); role {
	case "":
	case "reporter":
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		job := Job{Package: "tested", Flags: []string{"-run=^TestReport$"}, MaySkip: []string{"TestReport/may_skip"}}
		runJob(t, job, func(ctx context.Context, out io.Writer) error {
			cmd := exec.CommandContext(ctx, self, job.arguments()...)
			cmd.Env = append(os.Environ(), roleEnv+"=tested")
			cmd.Stdout, cmd.Stderr = out, out
			return cmd.Run()
		})
		return
	case "tested":
		tested(t)
		return
	}
	t.Parallel()
	out := runReporter(t)
	for _, want := range []string{
		"--- PASS: TestReport/TestReport/passes (",
		"--- PASS: TestReport/TestReport/with/a_slash/inner (",
		"--- FAIL: TestReport/TestReport/fails (",
		"--- SKIP: TestReport/TestReport/may_skip (",
		"--- FAIL: TestReport/TestReport/must_not_skip (",
		"it was skipped, and runs nowhere else: kvmtest_internal_test.go",
		"--- FAIL: TestReport/TestReport/panics (",
		"--- PASS: TestReport/TestReport/together/a (",
		"--- PASS: TestReport/TestReport/together/b (",
		"words of the one that passes",
		"words of the one that fails",
		"panic: words of the one that panics",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("there is no %q", want)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
}

// runReporter runs TestReport as the one that reports, and returns its output.
func runReporter(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestReport$", "-test.v")
	cmd.Env = append(os.Environ(), roleEnv+"=reporter")
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
		t.Errorf("the reporter ends with %v, want status 1", err)
	}
	return string(out)
}

// tested is the test that is reported.
func tested(t *testing.T) {
	t.Run("passes", func(t *testing.T) { t.Log("words of the one that passes") })
	t.Run("with/a slash", func(t *testing.T) { t.Run("inner", func(*testing.T) {}) })
	t.Run("fails", func(t *testing.T) { t.Error("words of the one that fails") })
	t.Run("may skip", func(t *testing.T) { t.Skip("words") })
	t.Run("must not skip", func(t *testing.T) { t.Skip("words") })
	t.Run("together", func(t *testing.T) {
		for _, name := range []string{"a", "b"} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				t.Log("words of " + name)
			})
		}
	})
	t.Run("panics", func(*testing.T) { panic("words of the one that panics") })
}
