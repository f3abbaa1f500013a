package datadir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	dataDirEnv    = "SMOLVM_DATA_DIR"
	systemDataDir = "/var/lib/smolvm"
)

// ErrMissing reports that there is no data directory yet, and that none was to be made.
var ErrMissing = errors.New("there is no data directory yet")

// Options are the options of [Open].
type Options struct {
	// Path is the path of the directory. Empty: $SMOLVM_DATA_DIR; else smolvm in the user's state
	// directory; else /var/lib/smolvm.
	Path string
	// Existing opens a directory that is there, and makes none; the error matches
	// [ErrMissing] then.
	Existing bool
}

// Open finds the data directory, makes it if it is missing, and finds out which one it
// is. A directory that was asked for by name is never replaced by another.
//
// It refuses a directory that belongs to another user or that others can write to.
func Open(opts Options) (*Dir, error) {
	path, note, err := locate(opts)
	if errors.Is(err, ErrMissing) {
		return nil, &missing{error: err, note: note}
	}
	if err != nil {
		return nil, err
	}
	// Once and for all: by any of its names it is the same directory.
	root, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("data directory %s: %w", path, err)
	}
	d := &Dir{Layout: Layout{root: root}, note: note}
	if opts.Existing {
		if isMissing(d.Database()) && isMissing(d.Images()) {
			return nil, &missing{error: fmt.Errorf("%s: %w", path, ErrMissing), note: note}
		}
	}
	if err := d.prepare(); err != nil {
		return nil, fmt.Errorf("prepare data directory: %w", err)
	}
	if err := d.identify(); err != nil {
		return nil, fmt.Errorf("data directory %s: %w", path, err)
	}
	return d, nil
}

// missing is an error that matches [ErrMissing].
type missing struct {
	error
	note string
}

func (m *missing) Unwrap() error { return m.error }

// Note is [Dir.Note] of the directory that is missing.
func (m *missing) Note() string { return m.note }

func isMissing(path string) bool {
	_, err := os.Stat(path)
	return errors.Is(err, fs.ErrNotExist)
}

func locate(opts Options) (dir, note string, err error) {
	for _, asked := range []struct{ by, dir string }{
		{"the DataDir option", opts.Path},
		{"$" + dataDirEnv, os.Getenv(dataDirEnv)},
	} {
		if asked.dir == "" {
			continue
		}
		dir, err := filepath.Abs(asked.dir)
		if err != nil {
			return "", "", fmt.Errorf("data directory %s: %w", asked.dir, err)
		}
		if err := makeOurs(dir, opts.Existing); err != nil {
			return "", "", fmt.Errorf("data directory from %s: %w; name one that is yours alone and that you can write to", asked.by, err)
		}
		return dir, "", nil
	}
	usual := userDataDir()
	if usual == "" {
		note := fmt.Sprintf("using data directory %s: neither $XDG_STATE_HOME nor $HOME is an absolute path", systemDataDir)
		if err := makeOurs(systemDataDir, opts.Existing); err != nil {
			return "", note, fmt.Errorf("no data directory can be used (set $%s to one that can): %w", dataDirEnv, err)
		}
		return systemDataDir, note, nil
	}
	err = makeOurs(usual, opts.Existing)
	if err == nil || errors.Is(err, ErrMissing) && canBeMade(usual) {
		return usual, "", err
	}
	note = fmt.Sprintf("using data directory %s, as the usual one can't be used: %v", systemDataDir, err)
	if systemErr := makeOurs(systemDataDir, opts.Existing); systemErr != nil {
		return "", note, fmt.Errorf("no data directory can be used (set $%s to one that can): %w", dataDirEnv, errors.Join(err, systemErr))
	}
	return systemDataDir, note, nil
}

// canBeMade reports whether a directory that is missing would be made if it were not
// only looked for.
func canBeMade(dir string) bool {
	for parent := filepath.Dir(dir); ; parent = filepath.Dir(parent) {
		err := unix.Access(parent, unix.W_OK|unix.X_OK)
		if !errors.Is(err, fs.ErrNotExist) || parent == "/" {
			return err == nil
		}
	}
}

// userDataDir returns the usual directory of this user; empty if there is none. A relative
// path in the environment is ignored, as the XDG Base Directory Specification wants it:
// it would be another directory in each working directory. Under cron and systemd $HOME
// may not be set.
func userDataDir() string {
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "smolvm")
	}
	home := os.Getenv("HOME")
	if home == "" {
		if current, err := user.LookupId(strconv.Itoa(os.Getuid())); err == nil {
			home = current.HomeDir
		}
	}
	if !filepath.IsAbs(home) {
		return ""
	}
	return filepath.Join(home, ".local", "state", "smolvm")
}

// makeOurs makes dir if it is missing, and returns why it can't be used.
func makeOurs(dir string, existing bool) error {
	if existing {
		if isMissing(dir) {
			return fmt.Errorf("%s: %w", dir, ErrMissing)
		}
	} else if err := os.MkdirAll(dir, dirMode); err != nil {
		return err
	}
	if err := requireOurs(dir); err != nil {
		return err
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return &fs.PathError{Op: "write to", Path: dir, Err: err}
	}
	return nil
}

// requireOurs refuses a directory that belongs to another user, for root too: what root
// makes in it its owner can't use, and what the owner has put there root would trust.
func requireOurs(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.IsDir():
		return &fs.PathError{Op: "use", Path: dir, Err: syscall.ENOTDIR}
	case ok && int(stat.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to %s, not to %s", dir, userName(int(stat.Uid)), userName(os.Geteuid()))
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%s can be written to by others (its mode is %04o; `chmod go-w %s` fixes that)", dir, info.Mode().Perm(), dir)
	}
	return nil
}

func userName(uid int) string {
	if found, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return "user " + found.Username
	}
	return "user " + strconv.Itoa(uid)
}
