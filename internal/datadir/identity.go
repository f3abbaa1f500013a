package datadir

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/compat"
	"github.com/smolvm/smolvm/internal/flock"
)

// identity is what identityName holds. The file goes with a copy of the directory, and
// what it says of the directory's inode does not: so a copy is told from the original.
type identity struct {
	ID string `json:"id"`
	// Format is [identityFormat]. Zero: from before there was one.
	Format int `json:"format,omitempty"`
	// Path is where the directory was when this was written; for people only.
	Path  string `json:"path"`
	Inode inode  `json:"inode"`
}

// inode tells one directory of this host from another.
type inode struct {
	Device uint64 `json:"device"`
	Number uint64 `json:"number"`
	// Born is when the inode was made, in nanoseconds since 1970, as its number may be
	// that of a directory that was removed; 0 where the file system keeps no such time.
	Born int64 `json:"born_ns,omitempty"`
}

func inodeOf(path string) (inode, error) {
	var stat unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_INO|unix.STATX_BTIME, &stat)
	if err != nil {
		return inode{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	found := inode{Device: unix.Mkdev(stat.Dev_major, stat.Dev_minor), Number: stat.Ino}
	if stat.Mask&unix.STATX_BTIME != 0 {
		found.Born = stat.Btime.Sec*1e9 + int64(stat.Btime.Nsec)
	}
	return found, nil
}

// identify reads which directory this is. One without an identity is new, or of a
// version that kept none: it is left to [Dir.Settle], as is a copy.
func (d *Dir) identify() error {
	now, err := inodeOf(d.root)
	if err != nil {
		return err
	}
	was, err := d.readIdentity()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if d.copied = was.Inode != now; d.copied {
		return nil
	}
	d.id = was.ID
	return nil
}

func (d *Dir) readIdentity() (identity, error) {
	var found identity
	text, err := os.ReadFile(d.path(identityName))
	if err != nil {
		return found, err
	}
	if err := json.Unmarshal(text, &found); err != nil || len(found.ID) < idDigits {
		return found, fmt.Errorf("%s is damaged (%w); remove it while no VM of this directory runs", d.path(identityName), errors.Join(err, fs.ErrInvalid))
	}
	return found, compat.Check("data directory "+d.root, found.Format, identityFormat)
}

// identityFormat is the number of the directory's layout beside the database, which has its
// own; see package compat.
const identityFormat = 1

// idDigits is the length of a directory's id.
const idDigits = 16

// Arrival says how a directory came to be at its place.
type Arrival struct {
	// Former is where a directory without an identity was used before; empty if it is
	// new, or has an identity.
	Former string
	// Forget is called before a copy gets an identity of its own: it must make the
	// directory forget the processes that belong to the original.
	Forget func() error
}

// Settle gives a directory that is new, copied, or restored from a backup its identity.
// It does nothing with one that has its own. If it fails it can be called again.
func (d *Dir) Settle(ctx context.Context, a Arrival) (err error) {
	if d.id != "" {
		return nil
	}
	lock, err := os.Open(d.root)
	if err != nil {
		return err
	}
	if err := flock.Lock(ctx, lock); err != nil { // closes it then
		return fmt.Errorf("lock %s: %w", d.root, err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := d.identify(); err != nil || d.id != "" { // another process was quicker
		return err
	}
	id, copied := newID(), d.copied
	if !copied && a.Former != "" {
		// VMs that run have named their sockets after the path that it had.
		id = shortHash(a.Former)
		if copied = isOther(a.Former, d.root); copied {
			id = newID()
		}
	}
	if copied {
		if err := a.Forget(); err != nil {
			return err
		}
	}
	if err := d.writeIdentity(id); err != nil {
		return err
	}
	d.id = id
	return nil
}

func newID() string {
	b := make([]byte, idDigits/2)
	_, _ = rand.Read(b) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b)
}

// isOther reports whether there is a directory at a path, and it is not the one at root.
func isOther(path, root string) bool {
	there, err := os.Stat(path)
	if err != nil {
		return false
	}
	here, err := os.Stat(root)
	return err == nil && !os.SameFile(there, here)
}

func (d *Dir) writeIdentity(id string) error {
	now, err := inodeOf(d.root)
	if err != nil {
		return err
	}
	text, err := json.MarshalIndent(identity{ID: id, Format: identityFormat, Path: d.root, Inode: now}, "", "  ")
	if err != nil {
		return err
	}
	temp := d.path("." + identityName)
	if err := os.WriteFile(temp, text, fileMode); err != nil {
		return err
	}
	return os.Rename(temp, d.path(identityName))
}
