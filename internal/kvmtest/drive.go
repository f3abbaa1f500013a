package kvmtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
)

// Where the outer machine has what was built of this checkout: its drive, mounted at mountPoint.
const (
	mountPoint = "/bed"
	testsDir   = "tests"
	sourceDir  = "src"
	cacheDir   = "cache"
	binDir     = "bin"
)

// driveSize is the size of the drive's file system, which is sparse, in bytes.
const driveSize = 16 << 30

// drive is what the outer machine's drive is made of.
type drive struct {
	module string // the directory of the module
	stage  string // where the drive's tree is laid out
}

// testBinary is the path of a package's test binary below the drive's root.
func testBinary(pkg string) string {
	return filepath.Join(testsDir, strings.ReplaceAll(pkg, "/", "_")+".test")
}

// addTests adds the test binary of a package, and its test data.
func (d drive) addTests(ctx context.Context, pkg string) error {
	err := d.build(ctx, "test", "-c", "-o", filepath.Join(d.stage, testBinary(pkg)), "./"+pkg)
	if err != nil {
		return fmt.Errorf("build tests of %s: %w", pkg, err)
	}
	source, target := filepath.Join(d.module, pkg), filepath.Join(d.stage, sourceDir, pkg)
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	data := filepath.Join(source, "testdata")
	if _, err := os.Stat(data); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return os.CopyFS(filepath.Join(target, "testdata"), os.DirFS(data))
}

// addProgram adds a program of the module.
func (d drive) addProgram(ctx context.Context, pkg string) error {
	err := d.build(ctx, "build", "-o", filepath.Join(d.stage, binDir, filepath.Base(pkg)), "./"+pkg)
	if err != nil {
		return fmt.Errorf("build %s: %w", pkg, err)
	}
	return nil
}

func (d drive) build(ctx context.Context, verb string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{verb, "-trimpath", "-ldflags=-s -w"}, args...)...)
	cmd.Dir = d.module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// addCache adds what tests have in their cache: the agent, and the default image that has it
// in it.
func (d drive) addCache(ctx context.Context, agent string, base smolvm.Image) error {
	cache := filepath.Join(d.stage, cacheDir)
	if err := link(ctx, agent, filepath.Join(cache, "smolvm-agent")); err != nil {
		return err
	}
	// smolvm looks for its agent beside itself.
	if err := link(ctx, agent, filepath.Join(d.stage, binDir, "smolvm-agent")); err != nil {
		return err
	}
	imageDir := filepath.Dir(base.RootfsPath)
	store := filepath.Dir(imageDir)
	names := []string{filepath.Join("names", smolvm.DefaultImage)}
	entries, err := os.ReadDir(imageDir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		names = append(names, filepath.Join(filepath.Base(imageDir), entry.Name()))
	}
	for _, name := range names {
		if err := link(ctx, filepath.Join(store, name), filepath.Join(cache, filepath.Base(store), name)); err != nil {
			return err
		}
	}
	return d.addKernel(ctx, cache)
}

// addKernel adds the kernel that guests boot with, if it is not the distribution's.
func (d drive) addKernel(ctx context.Context, cache string) error {
	kernel := testenv.KernelOfOurs()
	if kernel == "" {
		return nil
	}
	from := filepath.Dir(kernel)
	files, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := link(ctx, filepath.Join(from, file.Name()), filepath.Join(cache, filepath.Base(from), file.Name())); err != nil {
			return err
		}
	}
	return nil
}

// link gives a file another name, or copies it where that can't be.
func link(ctx context.Context, source, target string) error {
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	if err := os.Link(source, target); err == nil || errors.Is(err, fs.ErrExist) {
		return err
	}
	return place(ctx, source, target)
}

// make makes the drive's file from what was added, and removes that.
func (d drive) make(ctx context.Context, path string) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(file.Truncate(driveSize), file.Close()); err != nil {
		return err
	}
	mke2fs, err := find("mke2fs", "")
	if err != nil {
		return err
	}
	// Files of the image have large holes, which stay.
	cmd := exec.CommandContext(ctx, mke2fs, "-q", "-F", "-t", "ext4", "-m", "0",
		"-E", "root_owner=0:0,discard,lazy_itable_init=1,lazy_journal_init=1", "-d", d.stage, path)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make a drive of the tests: mke2fs: %w: %s", err, out)
	}
	return os.RemoveAll(d.stage)
}

// addAll adds all that jobs need.
func (d drive) addAll(ctx context.Context, jobs []Job, agent string, base smolvm.Image) error {
	built := map[string]bool{}
	for _, job := range jobs {
		if built[job.Package] {
			continue
		}
		built[job.Package] = true
		if err := d.addTests(ctx, job.Package); err != nil {
			return err
		}
	}
	if err := d.addProgram(ctx, "cmd/smolvm"); err != nil {
		return err
	}
	return d.addCache(ctx, agent, base)
}
