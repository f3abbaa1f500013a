// Package kernelbuild builds kernels for guests from the source package of the host's distribution
// and a configuration of our own, and keeps them by all that decides what they are.
//
// The store's directory:
//
//	<32 hex digits>/  a kernel: kernel.json, vmlinux, config, and the package with its source
//	used.json         which of them images boot with; not there: the distribution's kernel
//	build/            a build under way, or what an interrupted one has left to go on with
//	build.log         what the last build has said, and build.log.1 what was said before
//	lock              held while a kernel is built
//
// A kernel appears by a rename, so it is there either whole or not at all.
package kernelbuild

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/image/deb"
	"github.com/smolvm/smolvm/internal/step"
)

// buildVersion changes whenever the same source and configuration make another kernel.
const buildVersion = 1

// Files of a kernel.
const (
	recordFile = "kernel.json"
	kernelFile = "vmlinux"
	configFile = "config"
)

// Packages are those of the host's distribution.
type Packages interface {
	// Update fetches the lists of packages; warning tells that they are those of an earlier time.
	Update(ctx context.Context, progress func(percent float64)) (warning string, err error)
	// Candidate returns the version of a package that apt would install; ok is false if there is
	// none.
	Candidate(ctx context.Context, name string) (_ deb.Paragraph, ok bool, err error)
	// Names returns the names of packages that begin so.
	Names(ctx context.Context, beginning string) ([]string, error)
	// Download downloads a candidate, and returns its file, which is the caller's to move.
	Download(ctx context.Context, candidate deb.Paragraph, progress func(percent float64)) (path string, err error)
}

// Store builds and keeps kernels below a directory. Any number of processes may use it.
type Store struct {
	Dir string
	// Open opens the packages of the host's distribution, for this process alone until close is
	// called.
	Open func(ctx context.Context) (_ Packages, closePackages func(), err error)
}

// record is the kernel.json of a kernel.
type record struct {
	Package   string    `json:"package"`
	Version   string    `json:"version"`
	Compiler  string    `json:"compiler"`
	Hash      string    `json:"sha256"`
	Source    string    `json:"source"`
	CreatedAt time.Time `json:"created_at"`
}

// usedRecord is what used.json holds.
type usedRecord struct {
	Kernel string `json:"kernel"`
}

// Build builds a kernel, unless there is one of the same source, configuration and compiler, and has
// images boot with it, unless it is to be [smolvm.KernelOptions.Unused]. Of
// several processes that build at once, one does the work. A build that is interrupted or killed goes
// on when it is asked for again, as long as the host has not been restarted meanwhile.
func (s *Store) Build(ctx context.Context, opts smolvm.KernelOptions) (smolvm.Kernel, error) {
	if runtime.GOARCH != "amd64" {
		return smolvm.Kernel{}, fmt.Errorf("%w on %s: there is a configuration for amd64 only", smolvm.ErrUnsupported, runtime.GOARCH)
	}
	if opts.Version != "" && !isSeries(opts.Version) {
		return smolvm.Kernel{}, fmt.Errorf("version %q of a kernel: give two numbers, as in 6.12", opts.Version)
	}
	if err := s.checkPath(); err != nil {
		return smolvm.Kernel{}, err
	}
	if err := checkTools(ctx); err != nil {
		return smolvm.Kernel{}, err
	}
	by, err := compiler(ctx)
	if err != nil {
		return smolvm.Kernel{}, err
	}
	lock, err := s.lock(ctx)
	if err != nil {
		return smolvm.Kernel{}, err
	}
	defer func() { _ = lock.Close() }()
	b := build{store: s, opts: opts, lock: lock, compiler: by}
	if err := b.find(ctx); err != nil {
		return smolvm.Kernel{}, err
	}
	b.key = keyOf(b.source, by)
	if _, err = s.load(b.key); err != nil || opts.Force {
		err = b.make(ctx)
	} else {
		err = b.clear()
	}
	if err != nil {
		return smolvm.Kernel{}, err
	}
	if !opts.Unused {
		if err := writeJSON(s.usedPath(), usedRecord{Kernel: b.key}); err != nil {
			return smolvm.Kernel{}, err
		}
		step.Reached(ctx, "image kernel/used")
	}
	return s.load(b.key)
}

// checkPath checks that make can build in the directory: the source refuses a path with blanks or
// colons.
func (s *Store) checkPath() error {
	dir, err := filepath.Abs(s.Dir)
	if err != nil {
		return err
	}
	if target, err := filepath.EvalSymlinks(dir); err == nil {
		dir = target
	}
	if strings.ContainsAny(dir, " \t\n:") {
		return &smolvm.Error{Hint: "build it in another data directory: `smolvm --data-dir DIR image kernel --no-use`, then `smolvm image build --kernel FILE NAME`",
			Err: fmt.Errorf("a kernel can't be built in %q, which has blanks or colons", dir)}
	}
	return nil
}

// keyOf names all that a kernel is made of.
func keyOf(source deb.Paragraph, compiler string) string {
	text := fmt.Sprintf("kernel %d %s\n%s %s\n%s\n%s", buildVersion, runtime.GOARCH, source.Get("Package"), source.Get("Version"), compiler, guestConfig)
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:16])
}

// lock waits until no other process builds, nor anything that one has started and that has outlived
// it.
func (s *Store) lock(ctx context.Context) (*os.File, error) {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(s.lockPath(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock.Lock(ctx, file); err != nil {
		return nil, fmt.Errorf("wait for another build: %w", err)
	}
	return file, nil
}

func (s *Store) lockPath() string { return filepath.Join(s.Dir, "lock") }

// load reads a kernel.
func (s *Store) load(key string) (smolvm.Kernel, error) {
	dir := filepath.Join(s.Dir, key)
	var r record
	if err := readJSON(filepath.Join(dir, recordFile), &r); err != nil {
		return smolvm.Kernel{}, err
	}
	k := smolvm.Kernel{
		Package: r.Package, Version: r.Version, Compiler: r.Compiler, CreatedAt: r.CreatedAt,
		Path: filepath.Join(dir, kernelFile), ConfigPath: filepath.Join(dir, configFile), SourcePath: filepath.Join(dir, filepath.Base(r.Source)),
	}
	if len(r.Hash) < 12 {
		return smolvm.Kernel{}, fmt.Errorf("%s: it has no sum", filepath.Join(dir, recordFile))
	}
	k.Name = r.Package + " " + r.Version + " smolvm-" + r.Hash[:12]
	for _, path := range []string{k.Path, k.ConfigPath} {
		if _, err := os.Stat(path); err != nil {
			return smolvm.Kernel{}, err
		}
	}
	var used usedRecord
	k.Used = readJSON(s.usedPath(), &used) == nil && used.Kernel == key
	return k, nil
}

func (s *Store) usedPath() string { return filepath.Join(s.Dir, "used.json") }

// Reset has images boot with the distribution's kernel.
func (s *Store) Reset() error {
	if err := os.Remove(s.usedPath()); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Used returns the kernel that images boot with; ok is false for the distribution's.
func (s *Store) Used() (k smolvm.Kernel, ok bool, err error) {
	var used usedRecord
	if err := readJSON(s.usedPath(), &used); errors.Is(err, fs.ErrNotExist) {
		return smolvm.Kernel{}, false, nil
	} else if err != nil {
		return smolvm.Kernel{}, false, damaged(err)
	}
	if k, err = s.load(filepath.Base(used.Kernel)); err != nil {
		return smolvm.Kernel{}, false, damaged(err)
	}
	return k, true, nil
}

// damaged is the error of a kernel that is to be used, and is not there whole.
func damaged(err error) error {
	return &smolvm.Error{Hint: "`smolvm image kernel --force` builds it again, `smolvm image kernel --reset` has images boot with the distribution's",
		Err: fmt.Errorf("the kernel that was built for images is damaged: %w", err)}
}

// Prune removes the kernels that images don't boot with, and what an interrupted build has left. It
// leaves all as it is while a kernel is being built.
func (s *Store) Prune() error {
	entries, err := os.ReadDir(s.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	unlock, err := flock.TryAt(s.lockPath())
	if errors.Is(err, flock.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	var used usedRecord
	if err := readJSON(s.usedPath(), &used); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return damaged(err)
	}
	var errs []error
	for _, entry := range entries {
		if entry.IsDir() && entry.Name() != used.Kernel {
			errs = append(errs, removeTree(filepath.Join(s.Dir, entry.Name())))
		}
	}
	return errors.Join(errs...)
}

// removeTree removes a directory that may hold a kernel, which then is not found half removed.
func removeTree(dir string) error {
	if err := os.Remove(filepath.Join(dir, recordFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(dir)
}

func readJSON(path string, value any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, value); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// writeJSON makes a small file appear whole. Only one process at a time does that: it holds the
// store's lock.
func writeJSON(path string, value any) error {
	text, err := json.MarshalIndent(value, "", "\t")
	if err != nil {
		return err
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, append(text, '\n'), 0o600); err != nil {
		return err
	}
	if err := durable.Sync(temp); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

func hashFile(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// publish makes what is in a directory the kernel of a key.
func (s *Store) publish(ctx context.Context, out, key string) error {
	entries, err := os.ReadDir(out)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := durable.Sync(filepath.Join(out, entry.Name())); err != nil {
			return err
		}
	}
	if err := durable.Sync(out); err != nil {
		return err
	}
	final := filepath.Join(s.Dir, key)
	if err := removeTree(final); err != nil { // damaged, or to be built anew
		return err
	}
	step.Reached(ctx, "image kernel/cleared")
	if err := os.Rename(out, final); err != nil {
		return err
	}
	step.Reached(ctx, "image kernel/moved")
	return durable.Sync(s.Dir)
}
