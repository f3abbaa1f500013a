package manager

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
	"github.com/smolvm/smolvm/internal/diskspace"
	"github.com/smolvm/smolvm/internal/size"
)

const (
	diskBudgetEnv  = "SMOLVM_DISK_BUDGET"
	diskReserveEnv = "SMOLVM_DISK_RESERVE"
)

// DefaultDiskReserve is how much of the data directory's file system stays free, unless
// that is small: then it is a twentieth.
const DefaultDiskReserve = 256 << 20

// diskLimits finds out how many bytes the data directory may take (zero: as many as there
// are), and how many are to stay free (negative: none; zero: the default).
func (c Config) diskLimits() (budget, reserve int64, err error) {
	budget, err = fromEnv(c.DiskBudget, diskBudgetEnv)
	if err != nil {
		return 0, 0, err
	}
	reserve, err = fromEnv(c.DiskReserve, diskReserveEnv)
	if err == nil && reserve == 0 && os.Getenv(diskReserveEnv) != "" {
		reserve = -1 // that is what a zero means to people
	}
	return budget, reserve, err
}

// fromEnv is an option in bytes, or if that is zero what a variable says.
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

// checkRoom fails if there is no room for what takes more of the disk. The error matches
// [smolvm.ErrDiskBudget]. Two that check at once may both find room: the budget is for the
// sum of what guests write over hours, not for the last megabyte.
func (m *Manager) checkRoom() error {
	free, total, err := diskspace.Of(m.dataDir)
	if err != nil {
		return err
	}
	reserve := cmp.Or(m.diskReserve, min(DefaultDiskReserve, total/20))
	if free < reserve {
		return fmt.Errorf("%w: %s are free on the file system of %s, and %s are to stay free ($%s): remove VMs, snapshots or images, or other files",
			smolvm.ErrDiskBudget, size.Format(free), m.dataDir, size.Format(reserve), diskReserveEnv)
	}
	if m.diskBudget == 0 {
		return nil
	}
	used, kinds, err := m.diskUsage()
	if err != nil {
		return fmt.Errorf("find out what is used of the disk budget: %w", err)
	}
	if used >= m.diskBudget {
		return fmt.Errorf("%w: %s takes %s (%s), and %s are allowed ($%s): remove VMs, snapshots, templates or images",
			smolvm.ErrDiskBudget, m.dataDir, size.Format(used), kinds, size.Format(m.diskBudget), diskBudgetEnv)
	}
	return nil
}

// diskUsage counts the bytes that the data directory takes on disk, holes not counted and
// files of several names once; and lists what takes how much, the largest first.
func (m *Manager) diskUsage() (total int64, kinds string, err error) {
	type file struct{ device, inode uint64 }
	seen := map[file]bool{}
	byKind := map[string]int64{}
	err = filepath.WalkDir(m.dataDir, func(path string, entry fs.DirEntry, err error) error {
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
		name, _ := filepath.Rel(m.dataDir, path)
		kind, _, found := strings.Cut(name, string(filepath.Separator))
		if !found && strings.HasPrefix(name, filepath.Base(m.dir.Database())) {
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
