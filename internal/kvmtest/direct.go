package kvmtest

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/smolvm/smolvm/internal/testenv"
)

// RunDirectly runs a job on this host, and reports its tests as subtests of t.
func RunDirectly(t *testing.T, job Job) {
	t.Helper()
	if job.AsUser && os.Getuid() == 0 {
		t.Skip("it is for an ordinary user, and root runs this: no user of this host is known to be one who may open /dev/kvm")
	}
	d := drive{module: testenv.Module(t), stage: t.TempDir()}
	if err := d.addTests(t.Context(), job.Package); err != nil {
		t.Fatal(err)
	}
	runJob(t, job, func(ctx context.Context, out io.Writer) error {
		cmd := exec.CommandContext(ctx, filepath.Join(d.stage, testBinary(job.Package)), job.arguments()...)
		cmd.Dir = filepath.Join(d.module, job.Package)
		cmd.Stdout, cmd.Stderr = out, out
		return cmd.Run()
	})
}
