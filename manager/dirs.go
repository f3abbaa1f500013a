package manager

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/shim"
)

const (
	dataDirEnv    = "SMOLVM_DATA_DIR"
	systemDataDir = "/var/lib/smolvm"
	// maxSocketPath is the longest path of a unix socket: sun_path has 108 bytes,
	// the last of which is a NUL (see unix(7)).
	maxSocketPath = 107
)

// Names in the data directory.
const (
	databaseName = "smolvm.db"
	disksName    = "disks"
	imagesName   = "images"
	keysName     = "keys"
	locksName    = "locks"
	vmsName      = "vms"
	cacheName    = "cache"

	layersName    = "layers"
	poolName      = "pool"
	snapshotsName = "snapshots"
	templatesName = "templates"
)

// resolveDataDir finds the data directory, makes it, and checks that it can be
// written. A directory that was asked for by name is never replaced by another.
func resolveDataDir(option string) (string, error) {
	for _, asked := range []struct{ by, dir string }{
		{"the DataDir option", option},
		{"$" + dataDirEnv, os.Getenv(dataDirEnv)},
	} {
		if asked.dir == "" {
			continue
		}
		dir, err := filepath.Abs(asked.dir)
		if err != nil {
			return "", fmt.Errorf("data directory %s: %w", asked.dir, err)
		}
		if err := makeWritable(dir); err != nil {
			return "", fmt.Errorf("data directory from %s: %w; name one that you can write to", asked.by, err)
		}
		return dir, nil
	}
	var candidates []string
	if state := userStateDir(); state != "" {
		candidates = append(candidates, filepath.Join(state, "smolvm"))
	}
	candidates = append(candidates, systemDataDir)
	var errs []error
	for _, dir := range candidates {
		err := makeWritable(dir)
		if err == nil {
			return dir, nil
		}
		errs = append(errs, err)
	}
	return "", fmt.Errorf("no data directory can be written (set $%s to one that can): %w", dataDirEnv, errors.Join(errs...))
}

func userStateDir() string {
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return dir
	}
	if home, err := os.UserHomeDir(); err == nil {
		return filepath.Join(home, ".local", "state")
	}
	return ""
}

// makeWritable makes dir if it is missing and says whether it can be written.
func makeWritable(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return &fs.PathError{Op: "write to", Path: dir, Err: err}
	}
	return nil
}

// resolveSocketDir finds the directory for sockets. It is made when the first
// socket is.
func resolveSocketDir(option string) (string, error) {
	if option != "" {
		dir, err := filepath.Abs(option)
		if err != nil {
			return "", fmt.Errorf("socket directory %s: %w", option, err)
		}
		return dir, nil
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) && unix.Access(dir, unix.W_OK|unix.X_OK) == nil {
		return filepath.Join(dir, "smolvm"), nil
	}
	return privateTempDir(), nil
}

// privateTempDir is the directory below /tmp that belongs to this user. It does
// not follow TMPDIR, which may differ between the processes of one user.
func privateTempDir() string { return "/tmp/smolvm-" + strconv.Itoa(os.Getuid()) }

// runtimeDir is the directory of a VM's sockets. It follows from the data
// directory and the id alone, so that every process finds it. The data directory
// is part of the name because VMs of the same id in two data directories may
// share a socket directory.
func runtimeDir(socketDir, dataDir, id string) string {
	dir := filepath.Join(socketDir, id+"-"+shortHash(dataDir, 8))
	if len(shim.AgentSocket(dir)) <= maxSocketPath {
		return dir
	}
	return filepath.Join(privateTempDir(), shortHash(dir, 16))
}

func shortHash(s string, digits int) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])[:digits]
}

// makeRuntimeParent makes the directory that holds runtime directories. Below
// /tmp, where anybody may make one first, it must be ours alone.
func makeRuntimeParent(dir string) error {
	parent := filepath.Dir(dir)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return fmt.Errorf("make socket directory: %w", err)
	}
	if !strings.HasPrefix(parent, "/tmp/") {
		return nil
	}
	info, err := os.Lstat(parent)
	if err != nil {
		return fmt.Errorf("check socket directory: %w", err)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || int(stat.Uid) != os.Getuid() {
		return fmt.Errorf("socket directory %s belongs to somebody else; choose another with the SocketDir option", parent)
	}
	return nil
}

// vmDir holds a VM's log files and its known_hosts file.
func (m *Manager) vmDir(id string) string { return filepath.Join(m.dataDir, vmsName, id) }

func (m *Manager) runtimeDir(id string) string { return runtimeDir(m.socketDir, m.dataDir, id) }
