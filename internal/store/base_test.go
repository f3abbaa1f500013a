package store

import (
	"database/sql"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
)

// A database of version 2 has absolute paths in it. Those in the data directory become
// relative, wherever that is now; those of the user stay as they are (cases 21, 24).
func TestMigrateAbsolutePaths(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "smolvm.db")
	root := filepath.Dir(path)
	steps, err := migrations()
	if err != nil {
		t.Fatal(err)
	}
	old, err := open(t.Context(), path, Options{}, steps[:2])
	if err != nil {
		t.Fatal(err)
	}
	const former = "/home/u/a%_b/smolvm"
	for i, row := range []struct{ id, disk, options string }{
		{"web", former + "/disks/web.qcow2", ""},
		{"shared", "/srv/root.img", `{"rootfs_path":"/srv/root.img"}`},
		// A root file system of the user's own that looks as if it were ours.
		{"odd", "/srv/disks/odd.qcow2", `{"rootfs_path":"/srv/disks/odd.qcow2"}`},
		{"x", former + "/disks/x.qcow2", `{"rootfs_path":"/srv/root.img"}`},
	} {
		_, err := old.write.ExecContext(t.Context(), "INSERT INTO vms (id, state, lease, disk_path, log_path, options) VALUES (?, 'running', ?, ?, ?, nullif(?, ''))",
			row.id, i+2, row.disk, former+"/vms/"+row.id+"/console.log", row.options)
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	s := reopen(t, path, Options{})
	for id, want := range map[string]string{
		"web": root + "/disks/web.qcow2", "shared": "/srv/root.img", "odd": "/srv/disks/odd.qcow2", "x": root + "/disks/x.qcow2",
	} {
		vm, err := s.GetVM(t.Context(), id)
		if err != nil || vm.DiskPath != want || vm.LogPath != root+"/vms/"+id+"/console.log" {
			t.Errorf("%s: disk %s, log %s, %v; want %s", id, vm.DiskPath, vm.LogPath, err, want)
		}
	}
	if got, err := s.FormerRoot(t.Context()); err != nil || got != former {
		t.Errorf("FormerRoot = %q, %v; want %q", got, err, former)
	}
	if err := s.ForgetRuns(t.Context(), "it was copied"); err != nil {
		t.Fatal(err)
	}
	if vm, err := s.GetVM(t.Context(), "web"); err != nil || vm.State != smolvm.StateStopped || vm.Cause != "it was copied" || vm.StoppedAt.IsZero() {
		t.Errorf("after that: %+v, %v", vm, err)
	}
}

// No name of a file in the data directory is absolute in the database.
func TestNamesAreRelative(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	root := filepath.Dir(s.Path())
	n := newVM("web")
	n.DiskPath, n.LogPath, n.Layer = root+"/disks/web.qcow2", root+"/vms/web/console.log", root+"/layers/saved.qcow2"
	n.Base = n.Layer
	mustCreate(t, s, n)
	if err := s.Bases().Add(t.Context(), n.DiskPath, root+"/layers/l.qcow2"); err != nil {
		t.Fatal(err)
	}
	for table, columns := range map[string][]string{"vms": {"disk_path", "log_path", "layer"}, "bases": {"path", "base"}} {
		for _, column := range columns {
			names, err := s.texts(t.Context(), fmt.Sprintf("SELECT %s FROM %s", column, table))
			if err != nil || len(names) == 0 || slices.ContainsFunc(names, func(name string) bool { return strings.HasPrefix(name, "/") }) {
				t.Errorf("%s.%s = %q, %v", table, column, names, err)
			}
		}
	}
	vm, err := s.GetVM(t.Context(), "web")
	if err != nil || vm.DiskPath != n.DiskPath || vm.LogPath != n.LogPath || vm.Layer != n.Layer {
		t.Errorf("it is read as %+v, %v", vm, err)
	}
	users, err := s.Bases().On(t.Context(), n.Base)
	if err != nil || !slices.Equal(users, []string{n.DiskPath}) {
		t.Errorf("BasedOn = %q, %v", users, err)
	}
	if is, err := s.Bases().IsDisk(t.Context(), n.DiskPath); err != nil || !is {
		t.Errorf("IsDisk = %v, %v", is, err)
	}
}

// A disk that is retained still has its base when its VM is gone.
func TestBasesOfRetainedDisks(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	for _, retain := range []bool{true, false} {
		n := newVM("web")
		n.Config.RetainDisk, n.Base = retain, "/base"
		mustCreate(t, s, n)
		if err := s.DeleteVM(t.Context(), "web"); err != nil {
			t.Fatal(err)
		}
		if users, err := s.Bases().On(t.Context(), "/base"); err != nil || len(users) != map[bool]int{true: 1}[retain] {
			t.Errorf("retained: %v; users are %q, %v", retain, users, err)
		}
		if err := s.Bases().Remove(t.Context(), n.DiskPath, "/base"); err != nil {
			t.Fatal(err)
		}
	}
}

// That a VM was started or deleted is on stable storage when the call returns (D9).
func TestDurableTransactions(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	var inside, after int
	read := func(q querier, into *int) {
		t.Helper()
		if err := q.QueryRowContext(t.Context(), "PRAGMA synchronous").Scan(into); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.updateDurably(t.Context(), func(tx *sql.Tx) error { read(tx, &inside); return nil }); err != nil {
		t.Fatal(err)
	}
	if read(s.write, &after); inside != 2 || after != 1 {
		t.Errorf("synchronous is %d within and %d after, not FULL (2) and NORMAL (1)", inside, after)
	}
}
