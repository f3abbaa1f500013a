package guest

import (
	"errors"

	"golang.org/x/sys/unix"
)

// overlayOptions returns the options of an overlay whose upper directory is a whole layer. What they
// leave out of the kernel's abilities would keep it from that: renames of directories and changes of
// metadata are copies.
func overlayOptions(lower, upper, work string) string {
	return "lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + work + ",index=off,metacopy=off,redirect_dir=off"
}

// copyOwnerAndMode gives a file the owner and the mode of another. The root of an overlay has those
// of its upper directory.
func copyOwnerAndMode(from, to string) error {
	var stat unix.Stat_t
	if err := unix.Stat(from, &stat); err != nil {
		return err
	}
	return errors.Join(unix.Chown(to, int(stat.Uid), int(stat.Gid)), unix.Chmod(to, stat.Mode&0o7777))
}
