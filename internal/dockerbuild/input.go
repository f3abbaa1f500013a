package dockerbuild

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
)

// defaultName is the name that a Dockerfile has in a context.
const defaultName = "Dockerfile"

// Bounds of a context that is an archive.
const (
	maxContextEntries = 1_000_000
	maxContextBytes   = 64 << 30
)

// input is what an image is built from.
type input struct {
	// name is what errors call the Dockerfile, and text what it says.
	name string
	text []byte
	// tree are the files of the context, without what is ignored.
	tree    files.Tree
	ignored func(name string) bool
	close   func()
}

// open reads the Dockerfile, and opens the context. The caller closes what is returned.
func open(ctx context.Context, opts smolvm.DockerfileOptions, temp string) (*input, error) {
	in := &input{close: func() {}, name: opts.Dockerfile, text: opts.DockerfileText}
	var err error
	switch {
	case opts.Context != "":
		err = in.openDir(opts)
	case opts.ContextArchive != nil:
		err = in.openArchive(ctx, opts, temp)
	default:
		in.tree = files.Empty()
	}
	if err == nil && in.text == nil {
		err = errors.New("there is no Dockerfile: give its text, or a context that has it")
	}
	if in.name == "" {
		in.name = defaultName
	}
	if err != nil {
		in.close()
		return nil, err
	}
	return in, nil
}

// openDir opens a context that is a directory.
func (in *input) openDir(opts smolvm.DockerfileOptions) error {
	dir, err := files.OpenDir(opts.Context)
	if err != nil {
		return fmt.Errorf("open the build's context: %w", err)
	}
	in.close = func() { _ = dir.Close() }
	if in.text == nil {
		if err := in.readDockerfile(opts); err != nil {
			return err
		}
	}
	// One that is for this Dockerfile takes the place of the context's.
	var ignore *files.Ignore
	there := false
	if opts.Dockerfile != "" && opts.DockerfileText == nil {
		if ignore, there, err = files.ReadIgnore(host{}, opts.Dockerfile+files.IgnoreFile); err != nil {
			return err
		}
	}
	if !there {
		if ignore, there, err = files.ReadIgnore(dir, defaultName+files.IgnoreFile); err != nil {
			return err
		}
	}
	if !there {
		if ignore, _, err = files.ReadIgnore(dir, files.IgnoreFile); err != nil {
			return err
		}
	}
	in.leaveOut(dir, ignore)
	return nil
}

// leaveOut has the context be a tree without what is ignored.
func (in *input) leaveOut(tree files.Tree, ignore *files.Ignore) {
	in.tree = files.Without{Tree: tree, Ignore: ignore}
	in.ignored = func(name string) bool {
		ignored, err := ignore.Matches(name)
		return err == nil && ignored
	}
}

// readDockerfile reads the Dockerfile of the host.
func (in *input) readDockerfile(opts smolvm.DockerfileOptions) (err error) {
	names := []string{opts.Dockerfile}
	if opts.Dockerfile == "" {
		names = []string{filepath.Join(opts.Context, defaultName), filepath.Join(opts.Context, strings.ToLower(defaultName))}
	}
	for _, name := range names {
		in.name = name
		in.text, err = files.ReadSmall(host{}, name, dockerfile.MaxSize)
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = &smolvm.Error{Err: fmt.Errorf("there is no Dockerfile %q", names[0]), Hint: "give its path by -f"}
	}
	return err
}

// host are the files of the host that a user names.
type host struct{}

// Open opens a file. One that is none, such as a pipe, keeps nobody waiting.
func (host) Open(name string) (io.ReadCloser, error) {
	file, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("%q is a directory", name)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// openArchive reads a context that is an archive, or a Dockerfile alone.
func (in *input) openArchive(ctx context.Context, opts smolvm.DockerfileOptions, temp string) error {
	const enough = 64 << 10 // for the first header, however it is packed
	archive := bufio.NewReaderSize(opts.ContextArchive, enough)
	head, err := archive.Peek(enough)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the build's context: %w", err)
	}
	isArchive, err := files.IsArchive(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(head)), nil })
	if err != nil {
		return err
	}
	if !isArchive {
		return in.readText(archive, opts)
	}
	spool, err := files.NewSpool(temp, 0)
	if err != nil {
		return err
	}
	in.close = func() { _ = spool.Close() }
	tree := ocilayer.NewTree(spool, ocilayer.Limits{Entries: maxContextEntries, Bytes: maxContextBytes})
	err = tree.AddArchive(ctx, func() (io.ReadCloser, error) {
		return files.OpenArchive(func() (io.ReadCloser, error) { return io.NopCloser(archive), nil })
	})
	if err != nil {
		return fmt.Errorf("read the build's context: %w", err)
	}
	nodes := rooted{files.Nodes{Root: tree.Root(), Spool: spool}}
	ignore, _, err := files.ReadIgnore(nodes, files.IgnoreFile)
	if err != nil {
		return err
	}
	in.leaveOut(nodes, ignore)
	if in.text != nil {
		return nil
	}
	if in.name == "" {
		in.name = defaultName
	}
	in.text, err = files.ReadSmall(nodes, strings.TrimPrefix(path.Clean("/"+in.name), "/"), dockerfile.MaxSize)
	if errors.Is(err, fs.ErrNotExist) {
		err = &smolvm.Error{Err: fmt.Errorf("there is no Dockerfile %q in the archive", in.name), Hint: "give its path by -f"}
	}
	return err
}

// readText reads what is no archive as a Dockerfile.
func (in *input) readText(r io.Reader, opts smolvm.DockerfileOptions) error {
	if opts.Dockerfile != "" || in.text != nil {
		return errors.New("the build's context is no archive, and the Dockerfile was given apart from it")
	}
	text, err := io.ReadAll(io.LimitReader(r, dockerfile.MaxSize+1))
	if err != nil {
		return fmt.Errorf("read Dockerfile: %w", err)
	}
	in.text = text // how long it may be is checked with the rest
	in.tree = files.Empty()
	return nil
}

// rooted is a tree whose directories are root's, as those of a directory of the host.
type rooted struct{ files.Nodes }

// Lstat tells of a file.
func (r rooted) Lstat(name string) (files.File, error) {
	file, err := r.Nodes.Lstat(name)
	file.UID, file.GID = 0, 0
	return file, err
}
