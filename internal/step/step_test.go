package step_test

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/smolvm/smolvm/internal/step"
)

// A process ends at the step that it is to end at, and at no other.
func TestReached(t *testing.T) {
	if os.Getenv(step.CrashEnv) != "" {
		step.Reached(t.Context(), "first")
		_, _ = os.Stdout.WriteString("went on\n")
		step.Reached(t.Context(), "second")
		return
	}
	for name, went := range map[string]bool{"first": false, "second": true} {
		cmd := exec.Command(os.Args[0], "-test.run=TestReached$")
		cmd.Env = append(os.Environ(), step.CrashEnv+"="+name)
		out, err := cmd.Output()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || strings.Contains(string(out), "went on") != went {
			t.Errorf("%s: %v, %q", name, err, out)
		}
	}
}
