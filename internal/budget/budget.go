// Package budget bounds what a data directory takes of the host's disk.
package budget

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/diskspace"
	"github.com/smolvm/smolvm/internal/size"
)

const (
	bytesEnv   = "SMOLVM_DISK_BUDGET"
	reserveEnv = "SMOLVM_DISK_RESERVE"
)

// DefaultReserve is how much of the data directory's file system stays free, unless
// that is small: then it is a twentieth.
const DefaultReserve = 256 << 20

// Limits are how much a data directory may take, in bytes.
type Limits struct {
	// Bytes is how many it may take. Zero: as many as there are.
	Bytes int64
	// Reserve is how many are to stay free on its file system. Zero: [DefaultReserve], or a
	// twentieth of a small file system. Negative: none.
	Reserve int64
}

// FromEnv returns the limits with those that are zero taken from the environment.
func (l Limits) FromEnv() (Limits, error) {
	bytes, err := fromEnv(l.Bytes, bytesEnv)
	if err != nil {
		return Limits{}, err
	}
	reserve, err := fromEnv(l.Reserve, reserveEnv)
	if err != nil {
		return Limits{}, err
	}
	if reserve == 0 && os.Getenv(reserveEnv) != "" {
		reserve = -1 // that is what a zero means to people
	}
	return Limits{Bytes: bytes, Reserve: reserve}, nil
}

// Budget bounds one data directory.
type Budget struct {
	Dir    *datadir.Dir
	Limits Limits
}

// fromEnv returns an option in bytes, or if that is zero what a variable says.
func fromEnv(option int64, name string) (int64, error) {
	text := os.Getenv(name)
	if option != 0 || text == "" {
		return option, nil
	}
	mebibytes, err := size.ParseMebibytes(text)
	if err != nil {
		return 0, fmt.Errorf("$%s: %w", name, err)
	}
	return mebibytes << 20, nil
}

// Check fails if there is no room for what takes more of the disk. The error matches
// [smolvm.ErrDiskBudget]. Two that check at once may both find room: the budget is for the
// sum of what guests write over hours, not for the last megabyte.
func (b *Budget) Check() error { return b.CheckFor(0) }

// CheckFor is Check for so many bytes at once.
func (b *Budget) CheckFor(bytes int64) error {
	free, total, err := diskspace.Of(b.Dir.Root())
	if err != nil {
		return err
	}
	reserve := cmp.Or(b.Limits.Reserve, min(DefaultReserve, total/20))
	if free-bytes < reserve {
		return fmt.Errorf("%w: %s are free on the file system of %s, and %s are to stay free ($%s)%s: remove VMs, snapshots or images, or other files",
			smolvm.ErrDiskBudget, size.Format(free), b.Dir.Root(), size.Format(reserve), reserveEnv, wanted(bytes))
	}
	if b.Limits.Bytes == 0 {
		return nil
	}
	used, kinds, err := b.usage()
	if err != nil {
		return fmt.Errorf("find out what is used of the disk budget: %w", err)
	}
	if used+bytes >= b.Limits.Bytes {
		return fmt.Errorf("%w: %s takes %s (%s), and %s are allowed ($%s)%s: remove VMs, snapshots, templates or images",
			smolvm.ErrDiskBudget, b.Dir.Root(), size.Format(used), kinds, size.Format(b.Limits.Bytes), bytesEnv, wanted(bytes))
	}
	return nil
}

// wanted tells what room is asked for.
func wanted(bytes int64) string {
	if bytes == 0 {
		return ""
	}
	return ", and the copy of a disk takes " + size.Format(bytes)
}

// usage counts the bytes that the data directory takes on disk, holes not counted and
// files of several names once; and lists what takes how much, the largest first.
func (b *Budget) usage() (total int64, kinds string, err error) {
	type file struct{ device, inode uint64 }
	seen := map[file]bool{}
	byKind := map[string]int64{}
	err = filepath.WalkDir(b.Dir.Root(), func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return ignoreGone(err)
		}
		info, err := entry.Info()
		if err != nil {
			return ignoreGone(err)
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if !ok || entry.IsDir() {
			return nil
		}
		if stat.Nlink > 1 {
			key := file{stat.Dev, stat.Ino}
			if seen[key] {
				return nil
			}
			seen[key] = true
		}
		const blockSize = 512 // of st_blocks, whatever the file system's is; see stat(3type)
		name, _ := filepath.Rel(b.Dir.Root(), path)
		kind, _, found := strings.Cut(name, string(filepath.Separator))
		if !found && strings.HasPrefix(name, filepath.Base(b.Dir.Database())) {
			kind = "database"
		}
		byKind[kind] += stat.Blocks * blockSize
		total += stat.Blocks * blockSize
		return nil
	})
	return total, describeKinds(byKind), err
}

// describeKinds lists what takes a megabyte or more.
func describeKinds(byKind map[string]int64) string {
	kinds := slices.SortedFunc(maps.Keys(byKind), func(a, b string) int {
		return cmp.Or(cmp.Compare(byKind[b], byKind[a]), cmp.Compare(a, b))
	})
	var parts []string
	for _, kind := range kinds {
		if byKind[kind] >= 1<<20 {
			parts = append(parts, kind+" "+size.Format(byKind[kind]))
		}
	}
	return strings.Join(parts, ", ")
}

// ignoreGone makes a success of a file that has been removed since it was listed.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
