package kernelbuild

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/diskspace"
	"github.com/smolvm/smolvm/internal/image/deb"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/size"
	"github.com/smolvm/smolvm/internal/step"
)

const (
	// sourcePackage is what the distribution's packages with the kernel's source are called, each
	// with its version behind it; that name alone is a package that depends on the one of the
	// distribution's own kernel.
	sourcePackage = "linux-source"
	// needBytes is how much room a build takes while it goes on: the source, and what is made of it.
	needBytes = 3 << 30
	// compiled is about how many files are compiled, to tell how far a build is; each step of the
	// progress tells of so many.
	compiled, compiledStep = 2400, 200
	// maxConfig bounds the configuration of a kernel, in bytes; one has some 130 KB.
	maxConfig = 4 << 20
)

// build is one build. The store's lock is held.
type build struct {
	store         *Store
	opts          smolvm.KernelOptions
	lock          *os.File
	compiler, key string
	source        deb.Paragraph // of the package
}

func (b *build) say(phase string, done, total int64) {
	if b.opts.Progress != nil {
		b.opts.Progress(smolvm.Progress{Phase: phase, Done: done, Total: total})
	}
}

// series is a version of the kernel as --version has it.
var series = regexp.MustCompile(`^[0-9]{1,3}\.[0-9]{1,3}$`)

func isSeries(version string) bool { return series.MatchString(version) }

// name returns what the package is, in words.
func (b *build) name() string { return b.source.Get("Package") + " " + b.source.Get("Version") }

// dir returns the directory of the build under way; see [tree] for what is in it.
func (b *build) dir() string { return filepath.Join(b.store.Dir, "build") }

// find finds the package with the source.
func (b *build) find(ctx context.Context) error {
	packages, closePackages, err := b.store.Open(ctx)
	if err != nil {
		return err
	}
	defer closePackages()
	b.say("fetch package lists", 0, 0)
	warning, err := packages.Update(ctx, func(float64) {})
	if err != nil {
		return err
	}
	if warning != "" {
		b.say("use package lists of an earlier time: "+warning, 0, 0)
	}
	b.source, err = b.choose(ctx, packages)
	return err
}

// choose returns the package of the version that is asked for.
func (b *build) choose(ctx context.Context, packages Packages) (deb.Paragraph, error) {
	var names []string
	if b.opts.Version == "" {
		meta, _, err := packages.Candidate(ctx, sourcePackage)
		if err != nil {
			return meta, err
		}
		// Of a default: linux-source-6.1 (= 6.1.192-3)
		name, _, _ := strings.Cut(strings.TrimSpace(meta.Get("Depends")), " ")
		names = []string{strings.TrimSuffix(name, ",")}
	} else {
		// Ubuntu has a third number in the name.
		names = []string{sourcePackage + "-" + b.opts.Version, sourcePackage + "-" + b.opts.Version + ".0"}
	}
	for _, name := range names {
		if !strings.HasPrefix(name, sourcePackage+"-") || !deb.IsName(name) {
			continue
		}
		found, ok, err := packages.Candidate(ctx, name)
		if ok || err != nil {
			return found, err
		}
	}
	what := "the kernel of this distribution"
	if b.opts.Version != "" {
		what = "kernel " + b.opts.Version
	}
	return deb.Paragraph{}, &smolvm.Error{Hint: available(ctx, packages),
		Err: fmt.Errorf("apt has no package with the source of %s", what)}
}

// available says which versions there are.
func available(ctx context.Context, packages Packages) string {
	const none = "apt's sources need the distribution's main component"
	names, err := packages.Names(ctx, sourcePackage+"-")
	if err != nil {
		return none
	}
	var versions []string
	for _, name := range names {
		version := strings.TrimSuffix(strings.TrimPrefix(name, sourcePackage+"-"), ".0")
		if isSeries(version) {
			versions = append(versions, "--version "+version)
		}
	}
	if len(versions) == 0 {
		return none
	}
	return "there is " + strings.Join(versions, ", ")
}

// make builds the kernel and has it appear. What an interrupted build of the same kernel has left is
// gone on with; after an error nothing is left but the log.
func (b *build) make(ctx context.Context) error {
	if b.opts.Force {
		if err := os.RemoveAll(b.dir()); err != nil {
			return err
		}
	}
	t, err := b.prepare()
	if err != nil {
		return err
	}
	defer func() { _ = t.log.Close() }()
	err = t.produce(ctx)
	if ctx.Err() != nil && err != nil {
		return err // to go on from here
	}
	return errors.Join(err, os.RemoveAll(b.dir()))
}

// tree is the directory of a build under way.
//
//	state.json   which kernel it is of
//	source/      the source
//	*.deb        the package that it came in
//	unpacked     is there when the source is whole, with its configuration
//	out/         the kernel to be
type tree struct {
	*build

	dir string
	log *ring.Log
}

// treeState is the state.json of a tree.
type treeState struct {
	Key string `json:"key"`
	// Boot is the host's boot in which it was begun: files that a build has made are looked at by
	// their times only, and after a power cut one may be empty.
	Boot string `json:"boot"`
}

// clear removes what a build has left that was killed when its kernel was there.
func (b *build) clear() error {
	var has treeState
	if err := readJSON(b.statePath(), &has); err == nil && has.Key == b.key { // else another's, to go on with
		return os.RemoveAll(b.dir())
	}
	return nil
}

func (b *build) statePath() string { return filepath.Join(b.dir(), "state.json") }

// prepare returns the directory of the build under way, empty unless it is of this kernel.
func (b *build) prepare() (*tree, error) {
	boot, err := proc.BootID()
	if err != nil {
		return nil, err
	}
	want, path := treeState{Key: b.key, Boot: boot}, b.statePath()
	var has treeState
	if err := readJSON(path, &has); err != nil || has != want {
		if err := os.RemoveAll(b.dir()); err != nil {
			return nil, err
		}
		if err := os.Mkdir(b.dir(), 0o700); err != nil {
			return nil, err
		}
		free, _, err := diskspace.Of(b.dir())
		if err != nil {
			return nil, err
		}
		if free < needBytes {
			return nil, &smolvm.Error{Hint: "free some, or build in another data directory: `smolvm --data-dir …`",
				Err: fmt.Errorf("a kernel takes %s to build, and %s has %s", size.Format(needBytes), b.store.Dir, size.Format(free))}
		}
		if err := writeJSON(path, want); err != nil {
			return nil, err
		}
	}
	log, err := ring.Open(b.logPath(), logBytes)
	if err != nil {
		return nil, err
	}
	_, _ = fmt.Fprintf(log, "[smolvm: build %s by %s]\n", b.name(), b.compiler)
	return &tree{build: b, dir: b.dir(), log: log}, nil
}

func (b *build) logPath() string { return filepath.Join(b.store.Dir, "build.log") }

func (t *tree) sourceDir() string { return filepath.Join(t.dir, "source") }

// produce goes through the steps of a build, but for those that were done before.
func (t *tree) produce(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(t.dir, "unpacked")); err != nil {
		file, err := t.fetch(ctx)
		if err != nil {
			return err
		}
		if err := t.unpack(ctx, file); err != nil {
			return err
		}
		step.Reached(ctx, "image kernel/unpacked")
		if err := t.configure(ctx); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(t.dir, "unpacked"), nil, 0o600); err != nil {
			return err
		}
		step.Reached(ctx, "image kernel/configured")
	}
	if err := t.compile(ctx); err != nil {
		return err
	}
	step.Reached(ctx, "image kernel/compiled")
	out, err := t.collect(ctx)
	if err != nil {
		return err
	}
	return t.store.publish(ctx, out, t.key)
}

// packagePath returns where the package is kept, which the licence asks of who passes the kernel on.
func (t *tree) packagePath() string {
	return filepath.Join(t.dir, t.source.Get("Package")+"_"+strings.ReplaceAll(t.source.Get("Version"), ":", "%3a")+".deb")
}

// fetch downloads the package, unless it is here, and returns its file.
func (t *tree) fetch(ctx context.Context) (string, error) {
	file := t.packagePath()
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	// One that is built anew has its package here, which apt has checked.
	if old := filepath.Join(t.store.Dir, t.key, filepath.Base(file)); os.Link(old, file) == nil {
		return file, nil
	}
	packages, closePackages, err := t.store.Open(ctx)
	if err != nil {
		return "", err
	}
	defer closePackages()
	total, err := strconv.ParseInt(t.source.Get("Size"), 10, 64)
	if err != nil {
		total = 0
	}
	phase := "download " + t.name()
	t.say(phase, 0, total)
	got, err := packages.Download(ctx, t.source, func(percent float64) { t.say(phase, int64(percent*float64(total)/100), total) })
	if err != nil {
		return "", err
	}
	step.Reached(ctx, "image kernel/downloaded")
	return file, os.Rename(got, file)
}

// unpack unpacks the source, which is an archive in the package.
func (t *tree) unpack(ctx context.Context, file string) error {
	t.say("unpack "+t.name(), 0, 0)
	if err := os.RemoveAll(t.sourceDir()); err != nil {
		return err
	}
	if err := os.Mkdir(t.sourceDir(), 0o700); err != nil {
		return err
	}
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	name, archive, closeArchive, err := openSource(in)
	if err != nil {
		return fmt.Errorf("package %s: %w", t.name(), err)
	}
	defer closeArchive()
	packing := "--xz"
	if strings.HasSuffix(name, ".bz2") {
		packing = "--bzip2"
	}
	// The package is signed, and is to be built: its archive is trusted no less.
	run := t.runner(t.dir)
	err = run.run(ctx, archive, nil, "tar", "--extract", packing, "--no-same-owner", "--strip-components=1", "--directory=source")
	if err != nil && ctx.Err() == nil {
		return run.explain("unpack "+t.name(), t.logPath(), err)
	}
	return err
}

// openSource finds the archive of the source in its package.
func openSource(file *os.File) (name string, archive io.Reader, closeArchive func(), err error) {
	info, err := file.Stat()
	if err != nil {
		return "", nil, nil, err
	}
	opened, err := deb.Read(file, info.Size())
	if err != nil {
		return "", nil, nil, err
	}
	data, err := opened.Data()
	if err != nil {
		return "", nil, nil, err
	}
	files := tar.NewReader(data)
	for {
		header, err := files.Next()
		if err != nil {
			_ = data.Close()
			if errors.Is(err, io.EOF) {
				err = errors.New("it has no archive of the source")
			}
			return "", nil, nil, err
		}
		name := path.Clean(header.Name)
		packed := strings.HasSuffix(name, ".tar.xz") || strings.HasSuffix(name, ".tar.bz2")
		if header.Typeflag == tar.TypeReg && packed && strings.HasPrefix(name, "usr/src/") && strings.HasPrefix(path.Base(name), sourcePackage) {
			return name, files, func() { _ = data.Close() }, nil
		}
	}
}

func (t *tree) runner(dir string) runner { return runner{dir: dir, log: t.log, lock: t.lock} }

// configure makes the configuration, and checks that it has all that is asked for.
func (t *tree) configure(ctx context.Context) error {
	t.say("configure "+t.name(), 0, 0)
	if err := os.WriteFile(filepath.Join(t.sourceDir(), "smolvm.config"), []byte(guestConfig), 0o600); err != nil {
		return err
	}
	run := t.runner(t.sourceDir())
	for _, command := range [][]string{
		{"make", "ARCH=x86_64", "tinyconfig"},
		{"scripts/kconfig/merge_config.sh", "-m", ".config", "smolvm.config"},
		{"make", "ARCH=x86_64", "olddefconfig"},
	} {
		if strings.Contains(command[0], "/") { // of the source, whose modes count for nothing
			command = append([]string{"sh"}, command...)
		}
		if err := run.run(ctx, nil, nil, command[0], command[1:]...); err != nil {
			if ctx.Err() != nil {
				return err
			}
			return run.explain("configure "+t.name(), t.logPath(), err)
		}
	}
	config, err := t.readConfig()
	if err != nil {
		return err
	}
	if wrong := unmet(guestConfig, config); len(wrong) > 0 {
		return &smolvm.Error{Hint: "another version may have them: `smolvm image kernel --version …`",
			Err: fmt.Errorf("configure %s: it does not have what guests need: %s", t.name(), strings.Join(wrong, "; "))}
	}
	return nil
}

func (t *tree) readConfig() (string, error) {
	file, err := os.Open(filepath.Join(t.sourceDir(), ".config"))
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	text, err := io.ReadAll(io.LimitReader(file, maxConfig))
	return string(text), err
}

// compile compiles the kernel.
func (t *tree) compile(ctx context.Context) error {
	jobs := t.opts.Jobs
	if jobs <= 0 {
		jobs = runtime.NumCPU()
	}
	phase := "compile " + t.name()
	t.say(phase+", some minutes of a processor", 0, 0)
	lines := 0
	told := func() {
		if lines++; lines%compiledStep == 0 {
			t.say(fmt.Sprintf("%s, %d of some %d files", phase, lines, compiled), 0, 0)
		}
	}
	run := t.runner(t.sourceDir())
	if err := run.run(ctx, nil, told, "make", "ARCH=x86_64", "-j"+strconv.Itoa(jobs), kernelFile); err != nil {
		if ctx.Err() != nil {
			return err
		}
		return run.explain(phase, t.logPath(), err)
	}
	return nil
}

// collect gathers the files of the kernel in a directory, and returns that.
func (t *tree) collect(ctx context.Context) (string, error) {
	out := filepath.Join(t.dir, "out")
	if err := os.RemoveAll(out); err != nil {
		return "", err
	}
	if err := os.Mkdir(out, 0o700); err != nil {
		return "", err
	}
	kernel := filepath.Join(out, kernelFile)
	run := t.runner(t.sourceDir())
	if err := run.run(ctx, nil, nil, "strip", "--strip-all", "-o", kernel, kernelFile); err != nil {
		if ctx.Err() != nil {
			return "", err
		}
		return "", run.explain("collect "+t.name(), t.logPath(), err)
	}
	config, err := t.readConfig()
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(out, configFile), []byte(config), 0o600); err != nil {
		return "", err
	}
	source := t.packagePath()
	if err := os.Link(source, filepath.Join(out, filepath.Base(source))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	hash, err := hashFile(kernel)
	if err != nil {
		return "", err
	}
	return out, writeJSON(filepath.Join(out, recordFile), record{
		Package: t.source.Get("Package"), Version: t.source.Get("Version"), Compiler: t.compiler,
		Hash: hash, Source: filepath.Base(source), CreatedAt: time.Now().UTC(),
	})
}
