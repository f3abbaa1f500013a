// Package snapshot keeps saved guests on disk: templates and the users' snapshots. It
// knows files, and no VMs.
//
// A snapshot is a directory. It is made under a name of its own and renamed when it is
// complete and on disk, so whatever is killed in the middle, a snapshot is either whole
// or not there.
package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
)

// Files of a snapshot.
const (
	MemoryFile = "memory"
	StateFile  = "state"

	recordFile  = "snapshot.json"
	checkedFile = "checked.json"
)

// DiskFile returns the name of the file with the guest's root disk as it was, by the disk's
// format.
func DiskFile(format string) string { return "disk." + format }

// Prefixes of directories that are no snapshots.
const (
	draftPrefix = ".draft-"
	trashPrefix = ".trash-"
)

// Store is a directory of snapshots.
type Store struct{ dir string }

// Open opens a directory, making it if it is missing.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	return &Store{dir: dir}, nil
}

// Snapshot is a complete saved guest.
type Snapshot struct {
	Name      string
	CreatedAt time.Time
	UsedAt    time.Time
	// Size is the room that the snapshot takes on disk, in bytes.
	Size int64
	// Meta is JSON that the maker of the snapshot keeps with it.
	Meta json.RawMessage

	dir   string
	files []file
}

// Path returns the path of one of the snapshot's files.
func (s Snapshot) Path(name string) string { return filepath.Join(s.dir, name) }

// record is the content of recordFile.
type record struct {
	CreatedAt time.Time       `json:"created_at"`
	Files     []file          `json:"files"`
	Meta      json.RawMessage `json:"meta"`
}

// file is one of a snapshot's files.
type file struct {
	Name string `json:"name"`
	Sum  string `json:"sum"`
}

// Get returns a snapshot. The error matches [smolvm.ErrNotFound] if there is none of
// that name.
func (s *Store) Get(name string) (Snapshot, error) {
	if err := checkName(name); err != nil {
		return Snapshot{}, err
	}
	dir := filepath.Join(s.dir, name)
	path := filepath.Join(dir, recordFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Snapshot{}, fmt.Errorf("%q: %w", name, smolvm.ErrNotFound)
	}
	var r record
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		return Snapshot{}, fmt.Errorf("read snapshot %q: %w", name, err)
	}
	found := Snapshot{Name: name, CreatedAt: r.CreatedAt, Meta: r.Meta, dir: dir, files: r.Files}
	if info, err := os.Stat(path); err == nil {
		found.UsedAt = info.ModTime()
	}
	for _, f := range r.Files {
		found.Size += allocated(found.Path(f.Name))
	}
	return found, nil
}

// allocated returns how much of a file is no hole, in bytes.
func allocated(path string) int64 {
	var stat unix.Stat_t
	if unix.Stat(path, &stat) != nil {
		return 0
	}
	return stat.Blocks * 512
}

// List returns all snapshots, the oldest first. One that can't be read is left out: it
// is of no use to anybody.
func (s *Store) List() ([]Snapshot, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var all []Snapshot
	for _, entry := range entries {
		if found, err := s.Get(entry.Name()); err == nil {
			all = append(all, found)
		}
	}
	slices.SortFunc(all, func(a, b Snapshot) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return all, nil
}

// Used notes that a snapshot has been used just now; see [Snapshot].UsedAt.
func (s *Store) Used(found Snapshot) {
	now := time.Now()
	_ = os.Chtimes(found.Path(recordFile), now, now)
}

// Remove removes a snapshot at once. Who has its files open goes on.
func (s *Store) Remove(name string) error {
	if _, err := s.Get(name); errors.Is(err, smolvm.ErrNotFound) || checkName(name) != nil {
		return fmt.Errorf("remove snapshot: %w", err)
	}
	trash, err := os.MkdirTemp(s.dir, trashPrefix+"*")
	if err == nil {
		err = os.Rename(filepath.Join(s.dir, name), filepath.Join(trash, name))
	}
	if err != nil {
		return fmt.Errorf("remove snapshot %q: %w", name, errors.Join(err, os.RemoveAll(trash)))
	}
	return os.RemoveAll(trash)
}

// Verify returns nil if the files are as they were saved. Contents are compared once
// for each boot of the host; after that, it is enough that no file has been touched
// since.
func (s *Store) Verify(ctx context.Context, found Snapshot, bootID string) error {
	now := check{BootID: bootID, Files: map[string]stamp{}}
	for _, f := range found.files {
		stamp, err := stampOf(found.Path(f.Name))
		if err != nil {
			return fmt.Errorf("snapshot %q: %w", found.Name, err)
		}
		now.Files[f.Name] = stamp
	}
	path := found.Path(checkedFile)
	if text, err := os.ReadFile(path); err == nil {
		var before check
		if json.Unmarshal(text, &before) == nil && now.equal(before) {
			return nil
		}
	}
	for _, f := range found.files {
		sum, err := disk.Sum(ctx, found.Path(f.Name))
		if err != nil {
			return fmt.Errorf("snapshot %q: %w", found.Name, err)
		}
		if sum != f.Sum {
			return fmt.Errorf("snapshot %q is damaged: file %s is not what was saved", found.Name, f.Name)
		}
	}
	now.write(path)
	return nil
}

// check says which files were found to be right.
type check struct {
	BootID string           `json:"boot_id"`
	Files  map[string]stamp `json:"files"`
}

// stamp changes whenever a file does.
type stamp struct {
	Inode   uint64 `json:"inode"`
	Size    int64  `json:"size"`
	Changed int64  `json:"changed_ns"`
}

func stampOf(path string) (stamp, error) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return stamp{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return stamp{Inode: stat.Ino, Size: stat.Size, Changed: stat.Ctim.Nano()}, nil
}

func (c check) equal(other check) bool {
	if c.BootID == "" || c.BootID != other.BootID || len(c.Files) != len(other.Files) {
		return false
	}
	for name, stamp := range c.Files {
		if other.Files[name] != stamp {
			return false
		}
	}
	return true
}

// write keeps a check for the next time. Without it that takes longer, no more.
func (c check) write(path string) {
	text, err := json.Marshal(c)
	if err != nil {
		return
	}
	temp := fmt.Sprintf("%s.%d", path, os.Getpid())
	if os.WriteFile(temp, text, 0o600) != nil || os.Rename(temp, path) != nil {
		_ = os.Remove(temp)
	}
}

func checkName(name string) error {
	if name == "" || strings.HasPrefix(name, ".") || strings.ContainsRune(name, filepath.Separator) {
		return fmt.Errorf("%q: %w", name, smolvm.ErrNotFound)
	}
	return nil
}
