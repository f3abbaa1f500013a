package testenv

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// Main runs a package's tests, for its TestMain, and returns the exit status. Where they are
// built with the race detector, so are the programs that they start as other roles of
// themselves, whose words go to logs that nobody reads. What the detector finds in those
// makes the tests fail too. And it does not hold such a program up for a second at its end,
// as it does otherwise. Nor does it matter to tests with a fake VMM whether QEMU is there.
func Main(run func() int) int {
	dir, err := os.MkdirTemp("", "smolvm-race-")
	if err == nil {
		defer func() { _ = os.RemoveAll(dir) }()
		err = standIn(dir, traits.QEMUProgram(runtime.GOARCH))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0 log_path="+filepath.Join(dir, "race")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	status := run()
	reports, _ := filepath.Glob(filepath.Join(dir, "race.*"))
	for _, path := range reports {
		text, err := os.ReadFile(path)
		fmt.Fprintf(os.Stderr, "in a program that the tests have started: %v\n%s\n", err, text)
		status = max(status, 1)
	}
	return status
}
