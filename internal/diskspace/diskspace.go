// Package diskspace tells how much room file systems have.
package diskspace

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Of returns how much room the file system of a directory has for this user, and how
// large it is, in bytes.
func Of(dir string) (free, total int64, err error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return 0, 0, fmt.Errorf("find out what is free in %s: %w", dir, err)
	}
	return int64(stat.Bavail) * stat.Bsize, int64(stat.Blocks) * stat.Bsize, nil
}
