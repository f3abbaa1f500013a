package snapshot

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

const bootID = "this boot"

// testDisk is the name of the file with a guest's disk.
var testDisk = DiskFile("qcow2")

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func draft(t *testing.T, s *Store, name string) *Draft {
	t.Helper()
	d, err := s.Draft(name)
	if err != nil {
		t.Fatal(err)
	}
	d.Disk = testDisk
	for _, file := range []string{MemoryFile, StateFile, testDisk} {
		if err := os.WriteFile(d.Path(file), []byte(file+" of "+name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func commit(t *testing.T, s *Store, name string) Snapshot {
	t.Helper()
	made, err := draft(t, s, name).Commit(t.Context(), map[string]string{"name": name}, bootID)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// entries are the names in the store's directory.
func entries(t *testing.T, s *Store) []string {
	t.Helper()
	all, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, entry := range all {
		names = append(names, entry.Name())
	}
	return names
}

func TestLife(t *testing.T) {
	s := open(t)
	if _, err := s.Get("one"); !errors.Is(err, smolvm.ErrNotFound) {
		t.Errorf("what is not there: %v", err)
	}
	d := draft(t, s, "one")
	if all, err := s.List(); err != nil || len(all) != 0 {
		t.Errorf("a draft is listed: %v, %v", all, err)
	}
	if _, err := d.Commit(t.Context(), map[string]int{"answer": 42}, bootID); err != nil {
		t.Fatal(err)
	}
	if err := d.Discard(); err != nil {
		t.Errorf("discard after commit: %v", err)
	}
	found, err := s.Get("one")
	if err != nil {
		t.Fatal(err)
	}
	var meta map[string]int
	if err := json.Unmarshal(found.Meta, &meta); err != nil || meta["answer"] != 42 {
		t.Errorf("meta is %s", found.Meta)
	}
	if text, err := os.ReadFile(found.Path(StateFile)); err != nil || string(text) != "state of one" {
		t.Errorf("the state is %q, %v", text, err)
	}
	if found.Size <= 0 || time.Since(found.CreatedAt) > time.Hour {
		t.Errorf("found %+v", found)
	}
	if _, err := s.Draft("one"); !errors.Is(err, smolvm.ErrAlreadyExists) {
		t.Errorf("a second of that name: %v", err)
	}
	commit(t, s, "two")
	if all, err := s.List(); err != nil || len(all) != 2 || all[0].Name != "one" {
		t.Errorf("list is %v, %v", all, err)
	}
	for range 2 {
		err := s.Remove("one")
		if _, getErr := s.Get("one"); !errors.Is(getErr, smolvm.ErrNotFound) {
			t.Errorf("remove: %v, then %v", err, getErr)
		}
	}
	if err := s.Remove("one"); !errors.Is(err, smolvm.ErrNotFound) {
		t.Errorf("remove again: %v", err)
	}
	if names := entries(t, s); len(names) != 1 {
		t.Errorf("left are %v", names)
	}
}

// Of two that make one of the same name, one does.
func TestSameName(t *testing.T) {
	s := open(t)
	first, second := draft(t, s, "x"), draft(t, s, "x")
	if _, err := first.Commit(t.Context(), 1, bootID); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Commit(t.Context(), 2, bootID); !errors.Is(err, smolvm.ErrAlreadyExists) {
		t.Errorf("the second: %v", err)
	}
	if found, err := s.Get("x"); err != nil || string(found.Meta) != "1" {
		t.Errorf("it is %s, %v", found.Meta, err)
	}
	if names := entries(t, s); len(names) != 1 {
		t.Errorf("left are %v", names)
	}
}

func TestNames(t *testing.T) {
	s := open(t)
	for _, name := range []string{"", ".", "..", ".hidden", "a/b", "../a"} {
		if d, err := s.Draft(name); err == nil {
			t.Errorf("a snapshot may be called %q", name)
			_ = d.Discard()
		}
		if _, err := s.Get(name); !errors.Is(err, smolvm.ErrNotFound) {
			t.Errorf("get %q: %v", name, err)
		}
		if err := s.Remove(name); !errors.Is(err, smolvm.ErrNotFound) {
			t.Errorf("remove %q: %v", name, err)
		}
	}
}

// A commit that can't be is none, and leaves nothing.
func TestIncomplete(t *testing.T) {
	s := open(t)
	for _, missing := range []string{MemoryFile, StateFile, testDisk} {
		d := draft(t, s, "x")
		if err := os.Remove(d.Path(missing)); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Commit(t.Context(), nil, bootID); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("without %s: %v", missing, err)
		}
	}
	if names := entries(t, s); len(names) != 0 {
		t.Errorf("left are %v", names)
	}
}

func TestVerify(t *testing.T) {
	flip := func(t *testing.T, path string) {
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = file.Close() }()
		if _, err := file.WriteAt([]byte{'!'}, 3); err != nil {
			t.Fatal(err)
		}
		// Who changes bytes may change times back; not the one that counts.
		if err := os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
	}
	tests := map[string]struct {
		harm func(t *testing.T, path string)
		boot string
		err  string
	}{
		"untouched":         {boot: bootID},
		"another boot":      {boot: "another boot"},
		"touched":           {harm: func(t *testing.T, path string) { _ = os.Chtimes(path, time.Now(), time.Now()) }, boot: bootID},
		"flipped":           {harm: flip, boot: bootID, err: "is damaged"},
		"flipped, rebooted": {harm: flip, boot: "another boot", err: "is damaged"},
		"truncated":         {harm: func(t *testing.T, path string) { _ = os.Truncate(path, 3) }, boot: bootID, err: "is damaged"},
		"gone":              {harm: func(t *testing.T, path string) { _ = os.Remove(path) }, boot: bootID, err: "no such file"},
	}
	for name, test := range tests {
		for _, file := range []string{MemoryFile, StateFile, testDisk} {
			t.Run(name+" "+file, func(t *testing.T) {
				s := open(t)
				found := commit(t, s, "x")
				if test.harm != nil {
					test.harm(t, found.Path(file))
				}
				for range 2 { // the second time knows of the first
					err := s.Verify(t.Context(), found, test.boot)
					if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
						t.Errorf("error is %v, want %q", err, test.err)
					}
				}
			})
		}
	}
}

// What was killed is cleaned up, and what is being made is not.
func TestClean(t *testing.T) {
	s := open(t)
	commit(t, s, "whole")
	alive := draft(t, s, "alive")
	killed := draft(t, s, "killed")
	if err := unix.Flock(int(killed.lock.Fd()), unix.LOCK_UN); err != nil { // as its maker's death does
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.dir, trashPrefix+"1", "old"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Clean(); err != nil {
		t.Fatal(err)
	}
	if names := entries(t, s); len(names) != 2 {
		t.Errorf("left are %v, want the whole one and the one being made", names)
	}
	if _, err := alive.Commit(t.Context(), nil, bootID); err != nil {
		t.Errorf("what was being made: %v", err)
	}
	if err := killed.Discard(); err != nil {
		t.Error(err)
	}
}

// A snapshot whose record can't be read is no snapshot, and can be removed.
func TestUnreadable(t *testing.T) {
	s := open(t)
	found := commit(t, s, "x")
	if err := os.WriteFile(found.Path(recordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if all, err := s.List(); err != nil || len(all) != 0 {
		t.Errorf("list is %v, %v", all, err)
	}
	if err := s.Remove("x"); err != nil {
		t.Error(err)
	}
	if names := entries(t, s); len(names) != 0 {
		t.Errorf("left are %v", names)
	}
}

func TestUsed(t *testing.T) {
	s := open(t)
	found := commit(t, s, "x")
	long := time.Now().Add(-time.Hour)
	if err := os.Chtimes(found.Path(recordFile), long, long); err != nil {
		t.Fatal(err)
	}
	s.Used(found)
	if again, err := s.Get("x"); err != nil || time.Since(again.UsedAt) > time.Minute {
		t.Errorf("used at %s, %v", again.UsedAt, err)
	}
	if err := s.Verify(t.Context(), found, bootID); err != nil {
		t.Errorf("to be used is no harm: %v", err)
	}
}
