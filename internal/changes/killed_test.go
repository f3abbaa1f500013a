package changes_test

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm/internal/changes"
	"github.com/smolvm/smolvm/internal/step"
)

// applyEnv tells the test's program to apply changes to a directory, which are no conflicts with what
// was there at a time: "TIME DIRECTORY".
const applyEnv = "SMOLVM_TEST_APPLY"

// Whoever applies changes may be killed at any moment: the next one brings what is missing, and takes
// nothing that the first one has brought for a change of the host's.
func TestApplyKilled(t *testing.T) {
	t.Parallel()
	if since, dir, child := strings.Cut(os.Getenv(applyEnv), " "); child {
		applySome(t, since, dir)
		return
	}
	for _, at := range []string{"apply/removed", "apply/made", "apply/brought"} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			dir, _ := host(t)
			since := time.Now().Format(time.RFC3339Nano)
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestApplyKilled$")
			child.Env = append(os.Environ(), applyEnv+"="+since+" "+dir, step.CrashEnv+"="+at)
			if out, err := child.CombinedOutput(); err == nil || !strings.Contains(err.Error(), "killed") {
				t.Fatalf("it was not killed: %v, %s", err, out)
			}
			applySome(t, since, dir)
			got := map[string]string{}
			err := fs.WalkDir(os.DirFS(dir), ".", func(path string, entry fs.DirEntry, err error) error {
				if err != nil || !entry.Type().IsRegular() {
					return err
				}
				text, err := os.ReadFile(filepath.Join(dir, path))
				got[path] = string(text)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(map[string]string{"a": "new", "made/f": "f", "sub/b": "new too"}, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// applySome scans, checks and applies changes, as a whole run does.
func applySome(t *testing.T, text, dir string) {
	t.Helper()
	since, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = root.Close() }()
	archive := archiveOf(t,
		file("a", "new"), directory("made"), file("made/f", "f"), directory("sub"), file("sub/.wh.deep", ""), file("sub/b", "new too"))
	plan, err := changes.Scan(t.Context(), archive, root, changes.Options{Since: since})
	if err == nil && len(plan.Conflicts) > 0 {
		err = fmt.Errorf("conflicts: %q", plan.Conflicts)
	}
	if err == nil {
		err = changes.Apply(t.Context(), archive, root, plan)
	}
	if err != nil {
		t.Fatal(err)
	}
}
