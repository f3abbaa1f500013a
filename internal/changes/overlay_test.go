package changes_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/changes"
)

// sourceOf returns what a guest has changed in a directory that it has at /project.
func sourceOf(t testing.TB, dir string, since time.Time, entries ...entry) changes.Source {
	t.Helper()
	archive := archiveOf(t, entries...)
	mount := smolvm.Mount{Source: dir, Target: "/project", Mode: smolvm.MountOverlay, Since: since}
	return changes.Source{
		Mount: mount, Mounts: []smolvm.Mount{mount, {Source: "/", Target: "/project/other"}, {Source: "/", Target: "/projects"}},
		TempDir: t.TempDir(), Limit: archive.Size,
		Send: func(_ context.Context, w io.Writer) error {
			_, err := io.Copy(w, io.NewSectionReader(archive.File, 0, archive.Size))
			return err
		},
	}
}

// Changes have their paths in the guest, where another mount is none, and no file is left over.
func TestFetch(t *testing.T) {
	t.Parallel()
	dir, _ := host(t)
	from := sourceOf(t, dir, time.Now().Add(time.Hour), file("a", "new"), directory("other"), directory("new"))
	o, err := changes.Fetch(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	want := []smolvm.Change{{Kind: smolvm.ChangeChanged, Path: "/project/a"}, {Kind: smolvm.ChangeAdded, Path: "/project/new"}}
	if diff := cmp.Diff(want, o.Changes()); diff != "" {
		t.Error(diff)
	}
	if err := errors.Join(o.CheckConflicts(), o.Apply(t.Context())); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(text) != "new" {
		t.Errorf("the host has %q, %v", text, err)
	}
	if left, err := os.ReadDir(from.TempDir); err != nil || len(left) > 0 {
		t.Errorf("what is left: %v, %v", left, err)
	}
}

func TestFetchFails(t *testing.T) {
	t.Parallel()
	gone := errors.New("the guest is gone")
	for name, test := range map[string]struct {
		change func(from *changes.Source)
		want   string
	}{
		"too much":  {func(from *changes.Source) { from.Limit-- }, "more than its disk holds"},
		"cut short": {func(from *changes.Source) { from.Send = func(context.Context, io.Writer) error { return gone } }, gone.Error()},
		"no archive": {func(from *changes.Source) {
			from.Send = func(_ context.Context, w io.Writer) error { _, err := io.WriteString(w, "no archive"); return err }
		}, "read what the guest has changed"},
		"no directory": {func(from *changes.Source) { from.Mount.Source += "/none" }, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := host(t)
			from := sourceOf(t, dir, time.Now(), file("a", "new"))
			test.change(&from)
			_, err := changes.Fetch(t.Context(), from)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the error is %v, want %q", err, test.want)
			}
			if left, err := os.ReadDir(from.TempDir); err != nil || len(left) > 0 {
				t.Errorf("what is left: %v, %v", left, err)
			}
		})
	}
}

// A conflict is an error that names some of the paths.
func TestCheckConflicts(t *testing.T) {
	t.Parallel()
	dir, root := host(t)
	var entries []entry
	for name := range strings.SplitSeq("1234567", "") {
		if err := root.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		entries = append(entries, file(name, "new"))
	}
	o, err := changes.Fetch(t.Context(), sourceOf(t, dir, time.Unix(0, 0), entries...))
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	err = o.CheckConflicts()
	var hinted *smolvm.Error
	if !errors.As(err, &hinted) || !strings.Contains(hinted.Hint, "--force") || !strings.HasSuffix(err.Error(), "changed 1, 2, 3, 4, 5 and 2 more") {
		t.Errorf("the error is %v", err)
	}
}
