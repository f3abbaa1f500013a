package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/image/apt"
)

// hostPackages fetches packages of the host's distribution into a directory; see package apt.
type hostPackages struct {
	*apt.Client

	dir     string
	private bool // the host's package lists are of no use; there are lists in dir
	// complaint is what apt had to say while it fetched those lists: it takes what
	// it gets, and an unreachable mirror only for a warning.
	complaint string
}

func newHostPackages(dir string) (*hostPackages, error) {
	client, err := apt.New(dir, "Dir::Cache="+filepath.Join(dir, "cache"))
	if errors.Is(err, apt.ErrMissing) {
		return nil, &smolvm.Error{Hint: "build an image from files with `smolvm image build --kernel … --rootfs …`",
			Err: fmt.Errorf("the default image is made from packages of Debian or Ubuntu: %w", err)}
	}
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			return nil, err
		}
	}
	return &hostPackages{Client: client, dir: dir}, nil
}

// update fetches package lists of our own. Packages that were downloaded by the
// host's lists go: there may be other versions now.
func (a *hostPackages) update(ctx context.Context) error {
	a.private = true
	a.Add("Dir::State::Lists="+filepath.Join(a.dir, "lists"), "Acquire::Languages=none")
	old, err := glob.In(a.dir, "*.deb")
	if err != nil {
		return err
	}
	for _, path := range old {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	_, complaint, err := a.Run(ctx, "apt-get", "update")
	a.complaint = apt.LastWords(complaint)
	return err
}

// dependencies lists the packages that one depends on. An unknown package has none.
func (a *hostPackages) dependencies(ctx context.Context, name string) []string {
	out, _, err := a.Run(ctx, "apt-cache", "depends", "--important", name)
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
func (a *hostPackages) kernelPackages(ctx context.Context) ([]string, error) {
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
func (a *hostPackages) download(ctx context.Context, packages []string, progress func(percent float64)) ([]string, error) {
	if _, err := a.Fetch(ctx, progress, append([]string{"download"}, packages...)...); err != nil {
		return nil, fmt.Errorf("download %s: %w", strings.Join(packages, ", "), err)
	}
	return a.packageFiles(packages)
}

// packageFiles finds what was downloaded.
func (a *hostPackages) packageFiles(packages []string) ([]string, error) {
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
		return fmt.Errorf("unpack %s: %w: %s", filepath.Base(deb), err, apt.LastWords(errs.String()))
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
