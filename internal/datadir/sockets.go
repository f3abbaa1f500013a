package datadir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/stream"
)

// LocateSockets finds the directory for sockets. It is made when the first socket is.
// Under sudo the environment may name the directory of another user: that is not used.
func LocateSockets(option string) (string, error) {
	if option != "" {
		dir, err := filepath.Abs(option)
		if err != nil {
			return "", fmt.Errorf("socket directory %s: %w", option, err)
		}
		return dir, nil
	}
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if filepath.IsAbs(dir) && requireOurs(dir) == nil && unix.Access(dir, unix.W_OK|unix.X_OK) == nil {
		return filepath.Join(dir, "smolvm"), nil
	}
	return privateTempDir(), nil
}

// privateTempDir returns the directory below /tmp that belongs to this user. It does
// not follow TMPDIR, which may differ between the processes of one user.
func privateTempDir() string { return "/tmp/smolvm-" + strconv.Itoa(os.Getuid()) }

// Runtime returns the directory of a VM's sockets. It follows from the data directory's
// identity and the VM's id alone, so that every process finds it. The identity is part
// of the name because VMs of the same id in two data directories may share a socket
// directory. The longest name of a socket in it has nameLength bytes.
func (d *Dir) Runtime(socketDir, id string, nameLength int) string {
	dir := filepath.Join(socketDir, id+"-"+d.id[:8])
	if len(dir)+1+nameLength <= stream.MaxSocketPath {
		return dir
	}
	return filepath.Join(privateTempDir(), shortHash(dir))
}

// MakeRuntimeParent makes the directory that holds runtime directories. It must belong
// to this user, and nobody else may write to it: who can put sockets there is believed.
func MakeRuntimeParent(dir string) error {
	parent := filepath.Dir(dir)
	if err := os.MkdirAll(parent, dirMode); err != nil {
		return fmt.Errorf("make socket directory: %w", err)
	}
	info, err := os.Lstat(parent)
	if err == nil && info.Mode().Type() == fs.ModeSymlink && filepath.Dir(parent) == "/tmp" {
		err = errors.New("it is a symbolic link")
	}
	if err == nil {
		err = requireOurs(parent)
	}
	if err != nil {
		return fmt.Errorf("socket directory %s can't be used: %w; choose another with the SocketDir option", parent, err)
	}
	return nil
}
