package host_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/host"
	"github.com/smolvm/smolvm/internal/testenv"
)

// Whether copies of disks cost anything is told by what the file system can do.
func TestCheckCopies(t *testing.T) {
	if found := host.CheckCopies(testenv.Reflinks(t), "test"); found.Severity != smolvm.SeverityOK || !strings.Contains(found.Problem, "share blocks in") {
		t.Errorf("with reflinks: %v", found)
	}
	dir := filepath.Join("/proc", "not", "yet") // where nothing can be written
	if found := host.CheckCopies(dir, "test"); found.Severity != smolvm.SeverityWarning || !strings.Contains(found.Problem, dir) || !strings.Contains(found.Fix, "XFS") {
		t.Errorf("without: %v", found)
	}
}
