package process

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// hogEnv makes TestHog take memory without end.
const hogEnv = "SMOLVM_TEST_HOG"

// TestHog is the process of TestMemoryHasAnEnd.
func TestHog(t *testing.T) {
	if os.Getenv(hogEnv) == "" {
		t.Skip("it is for TestMemoryHasAnEnd")
	}
	limitMemory()
	boundData()
	var kept [][]byte
	for range 4 << 10 { // 4 GiB
		block := make([]byte, 1<<20)
		for i := 0; i < len(block); i += 4 << 10 {
			block[i] = 1
		}
		kept = append(kept, block)
	}
	t.Log(len(kept))
}

// Whatever a guest makes a shim keep, the shim dies before it has taken the host's memory
// (S3).
func TestMemoryHasAnEnd(t *testing.T) {
	t.Parallel()
	if raceDetector {
		t.Skip("the race detector needs more memory than a shim may have")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestHog$")
	cmd.Env = append(os.Environ(), hogEnv+"=1")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !strings.Contains(string(out), "out of memory") {
		t.Fatalf("a shim that keeps all that it gets ends with %v: %.500s", err, out)
	}
	usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if most := int64(hardMemory>>10) + 64<<10; !ok || usage.Maxrss > most {
		t.Errorf("it took %d KiB, want at most %d", usage.Maxrss, most)
	}
}
