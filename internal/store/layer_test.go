package store

import (
	"path/filepath"
	"testing"
)

// A database of before layers were in the rows of VMs says which of them were being restored
// by what their disks are based on.
func TestMigrateLayers(t *testing.T) {
	t.Parallel()
	steps, err := migrations()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "smolvm.db")
	old, err := open(t.Context(), path, Options{}, steps[:5])
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for i, test := range []struct {
		id, state string
		bases     []string
		want      string
	}{
		{"new", "created", []string{"images/ab/rootfs"}, ""},
		{"restored", "created", []string{"layers/saved.qcow2"}, filepath.Join(filepath.Dir(path), "layers/saved.qcow2")},
		{"cloned-in-vain", "created", []string{"images/ab/rootfs", "layers/template.qcow2"}, ""},
		{"ran", "stopped", []string{"layers/saved.qcow2"}, ""},
		{"own-rootfs", "created", []string{"/home/me/rootfs"}, ""},
		{"no-disk", "created", nil, ""},
	} {
		disk := "disks/" + test.id + ".qcow2"
		if _, err := old.write.ExecContext(t.Context(), "INSERT INTO vms (id, state, lease, disk_path) VALUES (?, ?, ?, ?)", test.id, test.state, i+2, disk); err != nil {
			t.Fatal(err)
		}
		for _, base := range test.bases {
			if _, err := old.write.ExecContext(t.Context(), "INSERT INTO bases (path, base) VALUES (?, ?)", disk, base); err != nil {
				t.Fatal(err)
			}
		}
		want[test.id] = test.want
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	for id, layer := range want {
		if vm, err := s.GetVM(t.Context(), id); err != nil || vm.Layer != layer {
			t.Errorf("%s: layer %q, %v; want %q", id, vm.Layer, err, layer)
		}
	}
}
