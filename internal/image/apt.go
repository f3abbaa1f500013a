package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/glob"
)

// apt fetches packages of the host's distribution into a directory. It needs no
// privilege and changes nothing of the host: what apt writes goes below dir, and
// apt itself checks the signatures.
type apt struct {
	dir     string
	private bool // the host's package lists are of no use; there are lists in dir
	// complaint is what apt had to say while it fetched those lists: it takes what
	// it gets, and an unreachable mirror only for a warning.
	complaint string
}

// killDelay is how long what apt has started may go on after it was killed.
const killDelay = 5 * time.Second

func newAPT(dir string) (*apt, error) {
	for _, program := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, &smolvm.Error{Hint: "build an image from files with `smolvm image build --kernel … --rootfs …`",
				Err: fmt.Errorf("the default image is made from packages of Debian or Ubuntu, and %s is not on this host", program)}
		}
	}
	for _, name := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			return nil, err
		}
	}
	return &apt{dir: dir}, nil
}

func (a *apt) options() []string {
	options := []string{
		"-o", "Dir::Cache=" + filepath.Join(a.dir, "cache"),
		"-o", "Debug::NoLocking=1",
		// Root's apt would become a user that can't write to dir.
		"-o", "APT::Sandbox::User=" + userName(),
	}
	if a.private {
		options = append(options, "-o", "Dir::State::Lists="+filepath.Join(a.dir, "lists"), "-o", "Acquire::Languages=none")
	}
	return options
}

func userName() string {
	if os.Getuid() == 0 {
		return "root"
	}
	return ""
}

// command prepares a program of apt's.
func (a *apt) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, append(a.options(), args...)...)
	cmd.Dir = a.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.WaitDelay = killDelay
	return cmd
}

// run runs a program of apt's and returns what it wrote and what it complained of.
func (a *apt) run(ctx context.Context, name string, args ...string) (out, complaint string, err error) {
	cmd := a.command(ctx, name, args...)
	var outBuf, errBuf bytes.Buffer
	cmd.Stdout, cmd.Stderr = &outBuf, &errBuf
	err = cmd.Run()
	complaint = lastWords(errBuf.String())
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, complaint)
	}
	return outBuf.String(), complaint, err
}

// lastWords returns the end of a program's complaint, as one line.
func lastWords(text string) string {
	lines := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' })
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}

// update fetches package lists of our own. Packages that were downloaded by the
// host's lists go: there may be other versions now.
func (a *apt) update(ctx context.Context) error {
	a.private = true
	old, err := glob.In(a.dir, "*.deb")
	if err != nil {
		return err
	}
	for _, path := range old {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	_, complaint, err := a.run(ctx, "apt-get", "update")
	a.complaint = complaint
	return err
}

// dependencies lists the packages that one depends on. An unknown package has none.
func (a *apt) dependencies(ctx context.Context, name string) []string {
	out, _, err := a.run(ctx, "apt-cache", "depends", "--important", name)
	if err != nil {
		return nil
	}
	var names []string
	for line := range strings.Lines(out) {
		if dependency, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok {
			names = append(names, dependency)
		}
	}
	return names
}

// kernelPackages finds the packages that hold the newest kernel for VMs.
func (a *apt) kernelPackages(ctx context.Context) ([]string, error) {
	// Debian's kernel for clouds, Ubuntu's for VMs, and what derivatives may have.
	for _, meta := range []string{"linux-image-cloud-" + debArch(), "linux-image-virtual", "linux-image-" + debArch(), "linux-image-generic"} {
		for _, image := range a.dependencies(ctx, meta) {
			if !strings.HasPrefix(image, "linux-image-") {
				continue
			}
			packages := []string{image}
			// Ubuntu has the modules in a package of their own.
			for _, name := range a.dependencies(ctx, image) {
				if strings.HasPrefix(name, "linux-modules-") {
					packages = append(packages, name)
				}
			}
			return packages, nil
		}
	}
	const problem = "apt knows no package with a kernel for VMs"
	if a.complaint != "" {
		return nil, fmt.Errorf("%s; it says: %s", problem, a.complaint)
	}
	return nil, errors.New(problem)
}

// download fetches packages and returns their files. progress gets percents.
func (a *apt) download(ctx context.Context, packages []string, progress func(percent float64)) ([]string, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = read.Close() }()
	// apt reports to descriptor 3, the first extra file.
	cmd := a.command(ctx, "apt-get", append([]string{"-o", "APT::Status-Fd=3", "download"}, packages...)...)
	cmd.ExtraFiles = []*os.File{write}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	err = cmd.Start()
	_ = write.Close()
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = read.Close() })
	readProgress(read, progress)
	stop()
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("download %s: %w: %s", strings.Join(packages, ", "), err, lastWords(errs.String()))
	}
	return a.packageFiles(packages)
}

// readProgress reads lines such as "dlstatus:n:percent:text" until apt is done.
func readProgress(r io.Reader, progress func(percent float64)) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if fields := strings.SplitN(lines.Text(), ":", 4); len(fields) == 4 && fields[0] == "dlstatus" {
			if percent, err := strconv.ParseFloat(fields[2], 64); err == nil {
				progress(percent)
			}
		}
	}
}

// packageFiles finds what was downloaded.
func (a *apt) packageFiles(packages []string) ([]string, error) {
	var files []string
	for _, name := range packages {
		found, err := glob.In(a.dir, name+"_*.deb")
		if err != nil || len(found) != 1 {
			return nil, fmt.Errorf("download %s: apt-get says that it did, but there are %d files", name, len(found))
		}
		files = append(files, found[0])
	}
	return files, nil
}

// unpack unpacks the files of a package that want admits, below dir.
func unpack(ctx context.Context, deb, dir string, want func(name string) bool) error {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return fmt.Errorf("unpack %s: %w", filepath.Base(deb), err)
	}
	unpackErr := untar(out, dir, want)
	_, _ = io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("unpack %s: %w: %s", filepath.Base(deb), err, lastWords(errs.String()))
	}
	if unpackErr != nil {
		return fmt.Errorf("unpack %s: %w", filepath.Base(deb), unpackErr)
	}
	return nil
}

// untar writes regular files only, and none outside dir.
func untar(r io.Reader, dir string, want func(string) bool) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	in := tar.NewReader(r)
	for {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(header.Name, "./")
		if header.Typeflag != tar.TypeReg || !want(name) {
			continue
		}
		if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		file, err := root.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_EXCL, header.FileInfo().Mode().Perm())
		if err != nil {
			return err
		}
		_, err = io.Copy(file, in)
		if err := errors.Join(err, file.Close()); err != nil {
			return err
		}
	}
}
