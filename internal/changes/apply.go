package changes

import (
	"archive/tar"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/ocitar"
	"github.com/smolvm/smolvm/internal/step"
)

// tempPrefix begins the names of files that are not whole yet.
const tempPrefix = ".smolvm-apply-"

// Apply brings what a guest has changed to a directory of the host, as planned. Each file is the old
// or the new one at any time; when it fails, ctx is done, or the process is killed, some are new, and
// another scan and Apply bring the rest.
func Apply(ctx context.Context, archive Archive, root *os.Root, plan *Plan) error {
	if len(plan.Special) > 0 {
		return fmt.Errorf("%q is neither a file, a directory nor a link, and can't be brought back", plan.Special[0])
	}
	unlock, err := claim(ctx, root, plan)
	if err != nil {
		return err
	}
	defer unlock()
	// First, as the archive may have something else in the place of what goes.
	for name, kind := range plan.kinds {
		if kind != smolvm.ChangeDeleted {
			continue
		}
		if err := root.RemoveAll(name); err != nil {
			return err
		}
		step.Reached(ctx, "apply/removed")
	}
	return archive.each(ctx, func(name string, header *tar.Header, content io.Reader) error {
		if kind := plan.kinds[name]; kind != smolvm.ChangeAdded && kind != smolvm.ChangeChanged {
			return nil
		}
		if strings.HasPrefix(path.Base(name), ocitar.Whiteout) {
			return nil
		}
		if err := bring(ctx, root, name, header, content); err != nil {
			return fmt.Errorf("bring back %q: %w", name, err)
		}
		step.Reached(ctx, "apply/brought")
		return nil
	})
}

// claim waits until nobody else brings anything to the directory, and removes files that are not
// whole: whoever made them was killed. Where directories can't be locked nothing is removed.
func claim(ctx context.Context, root *os.Root, plan *Plan) (unlock func(), err error) {
	dir, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	if err := flock.Lock(ctx, dir); err != nil { // it has closed the directory
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return func() {}, nil
	}
	swept := map[string]bool{}
	for name := range plan.kinds {
		within := path.Dir(name)
		if swept[within] {
			continue
		}
		swept[within] = true
		if err := sweep(root, within); err != nil {
			return nil, errors.Join(err, dir.Close())
		}
	}
	return func() { _ = dir.Close() }, nil
}

// sweep removes files of a directory that are not whole.
func sweep(root *os.Root, name string) error {
	if info, err := root.Lstat(name); err != nil || !info.IsDir() {
		return nil // what the guest has there is yet to be made
	}
	dir, err := root.Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	names, err := dir.Readdirnames(-1)
	for _, file := range names {
		if strings.HasPrefix(file, tempPrefix) {
			err = errors.Join(err, removeIfThere(root, path.Join(name, file)))
		}
	}
	return err
}

// bring makes one file of the host what the guest has.
func bring(ctx context.Context, root *os.Root, name string, header *tar.Header, content io.Reader) error {
	perm := fs.FileMode(header.Mode & modeBits)
	there, err := root.Lstat(name)
	if err != nil && !isMissing(err) {
		return err
	}
	if header.Typeflag == tar.TypeDir {
		if err == nil && !there.IsDir() {
			err = root.Remove(name)
		}
		if err == nil && there.IsDir() {
			return root.Chmod(name, perm)
		}
		return errors.Join(root.Mkdir(name, 0o700), root.Chmod(name, perm))
	}
	temp := path.Join(path.Dir(name), tempPrefix+rand.Text())
	if err := makeTemp(root, temp, header, content, perm); err != nil {
		return errors.Join(err, removeIfThere(root, temp))
	}
	step.Reached(ctx, "apply/made")
	if there != nil && there.IsDir() {
		if err := root.RemoveAll(name); err != nil {
			return errors.Join(err, removeIfThere(root, temp))
		}
	}
	if err := root.Rename(temp, name); err != nil {
		return errors.Join(err, removeIfThere(root, temp))
	}
	return removeIfThere(root, temp) // it is, if both are names of one file
}

func removeIfThere(root *os.Root, name string) error {
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// makeTemp makes what is to take the place of a file.
func makeTemp(root *os.Root, temp string, header *tar.Header, content io.Reader, perm fs.FileMode) error {
	switch header.Typeflag {
	case tar.TypeSymlink:
		return root.Symlink(header.Linkname, temp)
	case tar.TypeLink:
		other, err := clean(header.Linkname)
		if err != nil {
			return err
		}
		return root.Link(other, temp)
	}
	file, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, content)
	if err == nil {
		err = file.Chmod(perm)
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	return root.Chtimes(temp, time.Time{}, header.ModTime)
}
