// Package layertar writes directories as the archives that layers of OCI images are, and
// unpacks such archives. It runs in guests.
//
// Of a directory that is the upper one of an overlay file system, an archive has what a layer
// has: whiteouts for what is hidden, and opaque entries in directories that hide all that is below
// them; see package ocitar.
//
// Times are cut to seconds, as docker has them: files without more are most of a layer, and
// each would need another header.
package layertar

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxXattr bounds an extended attribute, in bytes: the kernel's limit.
const maxXattr = 64 << 10

// pathOf returns a path to what a directory has under a name. It is the same file whatever
// is renamed, and shorter than the kernel's limit however deep the directory is.
func pathOf(dir int, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(dir) + "/" + name
}

// kept reports whether an extended attribute is part of an image. Those of overlays are how
// they keep their books; others that begin with "trusted." nothing of an image may rely on, as
// containerd drops them.
func kept(name string) bool {
	return !strings.HasPrefix(name, "trusted.") && !strings.HasPrefix(name, "user.overlay.") &&
		name != "security.selinux" && name != "security.ima" && name != "security.evm"
}

// listXattrs returns the names of the extended attributes of a file, a link itself.
func listXattrs(dir int, name string) ([]string, error) {
	path := pathOf(dir, name)
	for {
		size, err := unix.Llistxattr(path, nil)
		if errors.Is(err, unix.ENOTSUP) || err == nil && size == 0 {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list its extended attributes: %w", err)
		}
		buf := make([]byte, size)
		size, err = unix.Llistxattr(path, buf)
		if errors.Is(err, unix.ERANGE) { // there are more now
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list its extended attributes: %w", err)
		}
		return strings.Split(strings.TrimSuffix(string(buf[:size]), "\x00"), "\x00"), nil
	}
}

// getXattr returns an extended attribute; found is false if the file has it no more.
func getXattr(dir int, name, attribute string) (value string, found bool, err error) {
	buf := make([]byte, 256)
	for {
		size, err := unix.Lgetxattr(pathOf(dir, name), attribute, buf)
		switch {
		case err == nil:
			return string(buf[:size]), true, nil
		case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP):
			return "", false, nil
		case errors.Is(err, unix.ERANGE) && len(buf) < maxXattr:
			buf = make([]byte, maxXattr)
		default:
			return "", false, fmt.Errorf("read its extended attribute %s: %w", attribute, err)
		}
	}
}
