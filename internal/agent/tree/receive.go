package tree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// Receive reads a stream and puts the tree in its place, with modes and times. What
// exists already is treated as cp and docker cp do:
//
//   - Directories are merged; one that was there keeps its mode.
//   - A file is replaced when all of the new one has come, and keeps owner and mode.
//     It stays the same file if it has several names, or can't be replaced (a mount
//     point, a directory that can't be written).
//   - Any other thing in a tree that is not a directory is not written to, but for a
//     link, which is replaced. Target.Path itself is written to if it is a FIFO or a
//     device.
//
// No link is followed in a tree. What can't be made is told to note as a failure, and
// the rest goes on. The error says that nothing could be received, or not the rest.
// What has come by then is left in place, but for the file that was being written.
//
// With Target.Untrusted moreover set-user-id, set-group-id and sticky bits of files
// are dropped; links that lead out of the tree are left out, unless
// Target.KeepLinks; and a link to a file at the target itself is replaced.
func Receive(ctx context.Context, in *Decoder, target Target, note func(Note)) error {
	r := &receiver{ctx: ctx, in: in, target: target, note: note, dir: noHandle()}
	defer r.close()
	in.HardLinks = !target.Untrusted
	event, err := in.Next()
	if err != nil {
		return err
	}
	if event.Kind != EventEntry {
		return protocolError("it has no root")
	}
	if r.root, err = target.find(event.Entry.Kind); err != nil {
		return err
	}
	if event.Entry.Kind == File {
		if err := r.rootFile(event.Entry); err != nil {
			return err
		}
	} else if err := r.enterRoot(event.Entry); err != nil {
		return err
	}
	return r.rest()
}

// receiver makes a tree of a stream.
type receiver struct {
	ctx    context.Context
	in     *Decoder
	target Target
	note   func(Note)
	root   place
	levels []level // the root is the first
	dir    handle  // of the last level
}

// level is a directory that the receiver is in.
type level struct {
	name     string
	dev, ino uint64
	// entry has what the directory gets when it is complete, if made is set.
	entry Entry
	made  bool
}

func (r *receiver) close() {
	r.dir.close()
	if r.root.dir != nil {
		_ = r.root.dir.Close()
	}
}

// rest goes on from the root to the end of the stream.
func (r *receiver) rest() error {
	for {
		event, err := r.in.Next()
		if err == nil {
			switch event.Kind {
			case EventEntry:
				err = r.entry(event.Entry)
			case EventLeave:
				err = r.leave()
			case EventEnd:
				return nil
			default: // the decoder lets nothing else through
				err = protocolError("content without a file")
			}
		}
		if err != nil {
			return err
		}
	}
}

func (r *receiver) entry(entry Entry) error {
	switch entry.Kind {
	case File:
		return r.file(entry)
	case Dir:
		return r.enter(entry)
	case Symlink:
		return r.failed(entry.Name, r.symlink(entry))
	default:
		return r.failed(entry.Name, r.hardLink(entry))
	}
}

// path shows a name in the directory that the receiver is in.
func (r *receiver) path(name string) string {
	path := strings.TrimSuffix(r.root.path, "/")
	for _, level := range r.levels[min(1, len(r.levels)):] {
		path += "/" + level.name
	}
	return strings.TrimSuffix(path+"/"+name, "/")
}

// failed notes an error that concerns one file only, and returns any other.
func (r *receiver) failed(name string, err error) error {
	switch {
	case err == nil:
		return nil
	case isFinal(err):
		return fmt.Errorf("%s: %w", Display(r.path(name)), err)
	}
	r.note(Note{Path: r.path(name), Text: plain(err), Failed: true})
	return nil
}

// isFinal reports whether an error would meet all other files too.
func isFinal(err error) bool {
	for _, final := range []error{unix.ENOSPC, unix.EDQUOT, unix.EIO, unix.EROFS, unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, final) {
			return true
		}
	}
	return false
}

// plain returns the text of an error without the name of the file, which the message has
// already.
func plain(err error) string {
	if inner, ok := errors.AsType[*fs.PathError](err); ok {
		return inner.Err.Error()
	}
	return err.Error()
}

func (r *receiver) enterRoot(entry Entry) error {
	holder := handle{fd: int(r.root.dir.Fd())}
	made := false
	name := r.root.name
	if name == "" {
		name = "."
	} else {
		err := holder.mkdir(name)
		made = err == nil
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return &fs.PathError{Op: "write", Path: r.root.path, Err: err}
		}
	}
	inner, err := holder.enter(name)
	if err != nil {
		return &fs.PathError{Op: "write", Path: r.root.path, Err: err}
	}
	return r.push(inner, level{entry: entry, made: made})
}

func (r *receiver) push(inner handle, l level) error {
	stat, err := inner.stat(".")
	if err != nil {
		inner.close()
		return err
	}
	l.dev, l.ino = stat.Dev, stat.Ino
	r.levels = append(r.levels, l)
	r.dir.close()
	r.dir = inner
	return nil
}

// enter makes a directory, if it is not there, and goes into it.
func (r *receiver) enter(entry Entry) error {
	err := r.dir.mkdir(entry.Name)
	made := err == nil
	inner := noHandle()
	if err == nil || errors.Is(err, fs.ErrExist) {
		inner, err = r.dir.enter(entry.Name)
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			err = errors.New("it is not a directory, and the source is one")
		}
	}
	if err != nil {
		if err := r.failed(entry.Name, err); err != nil {
			return err
		}
		return r.in.skipDir()
	}
	return r.push(inner, level{name: entry.Name, entry: entry, made: made && !entry.Implicit})
}

// leave goes to the directory above, and gives the one below its mode and time.
func (r *receiver) leave() error {
	l := r.levels[len(r.levels)-1]
	r.levels = r.levels[:len(r.levels)-1]
	above := noHandle()
	if len(r.levels) > 0 {
		var err error
		if above, err = r.dir.enter(".."); err != nil {
			return &fs.PathError{Op: "leave", Path: r.path(l.name), Err: err}
		}
		// Somebody may have moved the directory elsewhere.
		outer := r.levels[len(r.levels)-1]
		if stat, err := above.stat("."); err != nil || stat.Dev != outer.dev || stat.Ino != outer.ino {
			above.close()
			return &fs.PathError{Op: "leave", Path: r.path(l.name), Err: errors.New("it was moved while it was copied to")}
		}
	}
	var err error
	if l.made {
		for _, setErr := range []error{
			dirfd.SetTime(r.dir.fd, ".", l.entry.ModTime),
			r.dir.chmod(l.entry.Permissions(r.target.Untrusted)),
		} {
			if !isUnsupported(setErr) {
				err = errors.Join(err, setErr)
			}
		}
	}
	r.dir.close()
	r.dir = above
	if err != nil {
		r.note(Note{Path: r.path(l.name), Text: plain(err), Failed: true})
	}
	return nil
}

// symlink makes a symbolic link, in place of anything but a directory.
func (r *receiver) symlink(entry Entry) error {
	if r.target.Untrusted && !r.target.KeepLinks && LeadsOut(entry.Link, len(r.levels)-1) {
		r.note(Note{Path: r.path(entry.Name), Text: LeftOutLink(entry.Link)})
		return nil
	}
	return r.dir.replace(entry.Name, func(name string) error {
		return unix.Symlinkat(entry.Link, r.dir.fd, name)
	})
}

// LeadsOut reports whether a symbolic link can lead out of a tree, so many
// directories below whose root it is. Only ".." at its start are taken: after another
// link they could lead anywhere.
func LeadsOut(link string, depth int) bool {
	if strings.HasPrefix(link, "/") {
		return true
	}
	up, down := 0, false
	for part := range strings.SplitSeq(link, "/") {
		switch part {
		case "", ".":
		case "..":
			if up++; down || up > depth {
				return true
			}
		default:
			down = true
		}
	}
	return false
}

// LeftOutLink returns what a [Note] says of a link that is left out.
func LeftOutLink(link string) string {
	return "left out: it is a symbolic link that leads out of what is copied, to " + Display(link)
}

// hardLink gives a file of the tree another name.
func (r *receiver) hardLink(entry Entry) error {
	// From the root, without following any link.
	root, err := handle{fd: int(r.root.dir.Fd())}.enter(or(r.root.name, "."))
	if err != nil {
		return err
	}
	defer func() { root.close() }()
	parts := strings.Split(strings.Trim(entry.Link, "/"), "/")
	for i, part := range parts {
		if !isName(part) {
			return fmt.Errorf("%q is no path in the tree", entry.Link)
		}
		if i == len(parts)-1 {
			break
		}
		inner, err := root.enter(part)
		if err != nil {
			return err
		}
		root.close()
		root = inner
	}
	last := parts[len(parts)-1]
	return r.dir.replace(entry.Name, func(name string) error {
		return unix.Linkat(root.fd, last, r.dir.fd, name, 0)
	})
}

func or(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

// rootFile receives a file that is all there is.
func (r *receiver) rootFile(entry Entry) error {
	out, err := r.openRoot(entry)
	if err == nil {
		var failure string
		failure, err = out.receive(r.in)
		if failure != "" {
			err = errors.New(failure)
		}
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", Display(r.root.path), withoutPath(err))
	}
	return nil
}

// withoutPath returns an error without the name of a file that the system's error has.
func withoutPath(err error) error {
	if inner, ok := errors.AsType[*fs.PathError](err); ok {
		return inner.Err
	}
	return err
}

func (r *receiver) openRoot(entry Entry) (*output, error) {
	if r.root.special == nil {
		entry.Name = r.root.name
		return handle{fd: int(r.root.dir.Fd())}.output(entry, r.target.Untrusted)
	}
	file, err := r.root.special(r.ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(r.ctx, func() { _ = file.SetDeadline(time.Unix(1, 0)) })
	return &output{file: file, stream: true, done: func() { stop() }}, nil
}

// file receives a file in a tree.
func (r *receiver) file(entry Entry) error {
	out, err := r.dir.output(entry, r.target.Untrusted)
	if err != nil {
		if err := r.failed(entry.Name, err); err != nil {
			return err
		}
		return r.in.skipFile()
	}
	// The sender tells of its own failure.
	_, err = out.receive(r.in)
	if lost, ok := errors.AsType[*writeError](err); ok {
		if err := r.failed(entry.Name, lost.err); err != nil {
			return err
		}
		return r.in.skipFile()
	}
	return err
}
