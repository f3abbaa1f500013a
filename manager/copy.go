package manager

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/tree"
)

// CopyTo copies a file or a tree of the host into the guest: [Manager.Copy] with the
// usual options.
func (m *Manager) CopyTo(ctx context.Context, id, hostPath, guestPath string) error {
	return m.Copy(ctx, smolvm.CopyPath{Path: hostPath}, smolvm.CopyPath{VM: id, Path: guestPath}, smolvm.CopyOptions{})
}

// CopyFrom copies a file or a tree of the guest to the host: [Manager.Copy] with the
// usual options.
func (m *Manager) CopyFrom(ctx context.Context, id, guestPath, hostPath string) error {
	return m.Copy(ctx, smolvm.CopyPath{VM: id, Path: guestPath}, smolvm.CopyPath{Path: hostPath}, smolvm.CopyOptions{})
}

// Copy copies a file, or a directory with all that is in it, into a VM, out of one, or
// from one VM to another. What lands where is as with cp -r and docker cp: a directory
// that exists receives the source under its name, or its contents if the source's path
// ends in "/."; else the target becomes the source, and its parent must exist. Modes,
// times, symbolic links and holes are kept. Owners and hard links are not: what is made
// belongs to root in a guest, and to the caller on the host.
//
// A file that exists is replaced when the new one has come whole, and keeps its owner
// and mode; so a copy that fails leaves the old file. If it has several names, is a
// mount point, or its directory can't be written, it is written over instead. A FIFO or
// a device that the target's path names is written to. A directory that exists keeps
// its mode.
//
// A guest is not trusted: nothing outside the target is touched on the host (or in the
// other VM) whatever it sends, no link in or at the target is followed (but one to a
// directory that the target's path names, and one to a FIFO or device), and set-id bits
// are dropped.
//
// What can't be read or written is left out, and the rest is copied; see [smolvm.CopyOptions].
// When ctx is done the copy ends at once, and what it has copied by then is left, but
// for the file that was being written.
func (m *Manager) Copy(ctx context.Context, from, to smolvm.CopyPath, opts smolvm.CopyOptions) error {
	if err := checkCopy(from, to); err != nil {
		return err
	}
	options := agentOptions(opts, from.VM, to.VM)
	var source, target *guestClient
	var err error
	if from.VM != "" {
		source, err = m.client(ctx, from.VM, "copy from")
	}
	if err == nil && to.VM != "" {
		target, err = m.client(ctx, to.VM, "copy to")
	}
	if err != nil {
		return err
	}
	switch {
	case source == nil:
		err = target.CopyTo(ctx, from.Path, to.Path, options)
	case target == nil:
		err = source.CopyFrom(ctx, from.Path, to.Path, options)
	default:
		err = agent.CopyBetween(ctx, source.Client, from.Path, target.Client, to.Path, options)
	}
	if err != nil {
		return fmt.Errorf("copy %s to %s: %w", from, to, err)
	}
	return nil
}

// GetTree returns a file or a tree of the guest as a tar stream in PAX format. It has what
// [Manager.Copy] would copy, below the source's name; hard links and owners are not kept.
// That the path does not exist, or can't be read at all, is an error of the call; what fails
// later is one of a read, which fails too when ctx is done. The caller closes the stream.
func (m *Manager) GetTree(ctx context.Context, id, guestPath string, opts smolvm.CopyOptions) (io.ReadCloser, error) {
	from := smolvm.CopyPath{VM: id, Path: guestPath}
	if err := checkPath(id, "source", guestPath); err != nil {
		return nil, err
	}
	client, err := m.client(ctx, id, "copy from")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	read, write := io.Pipe()
	go func() {
		err := client.GetTar(ctx, guestPath, write, agentOptions(opts, id, ""))
		if err != nil {
			err = fmt.Errorf("copy %s to a tar stream: %w", from, err)
		}
		_ = write.CloseWithError(err) // nil is the stream's end
	}()
	stream := &treeStream{Reader: bufio.NewReader(read), pipe: read, cancel: cancel}
	if _, err := stream.Peek(1); err != nil && !errors.Is(err, io.EOF) {
		return nil, errors.Join(err, stream.Close())
	}
	return stream, nil
}

// treeStream is a tar stream of a copy that goes on meanwhile.
type treeStream struct {
	*bufio.Reader
	pipe   *io.PipeReader
	cancel context.CancelFunc
}

// Close gives up what is left of the copy.
func (s *treeStream) Close() error {
	s.cancel()
	return s.pipe.Close()
}

// PutTree puts what is in a tar stream into a directory of the guest, which must exist.
// All of it belongs to root; hard links are kept. When ctx is done it returns, although
// a call of r may go on.
func (m *Manager) PutTree(ctx context.Context, id, guestPath string, r io.Reader, opts smolvm.CopyOptions) error {
	to := smolvm.CopyPath{VM: id, Path: guestPath}
	if err := checkPath(id, "target", guestPath); err != nil {
		return err
	}
	client, err := m.client(ctx, id, "copy to")
	if err != nil {
		return err
	}
	if err := client.PutTar(ctx, r, guestPath, agentOptions(opts, "", id)); err != nil {
		return fmt.Errorf("copy a tar stream to %s: %w", to, err)
	}
	return nil
}

func checkCopy(from, to smolvm.CopyPath) error {
	id := from.VM
	if id == "" {
		id = to.VM
	}
	if from.VM == to.VM {
		problem := "is not in a VM, and neither is the source"
		if id != "" {
			problem = "is in the same VM as the source; run cp in it"
		}
		return invalidCopy(id, "target", problem)
	}
	if err := checkPath(id, "source", from.Path); err != nil {
		return err
	}
	return checkPath(id, "target", to.Path)
}

func checkPath(id, field, path string) error {
	if path == "" {
		return invalidCopy(id, field, "is an empty path")
	}
	return nil
}

func invalidCopy(id, field, problem string) error {
	return &smolvm.ValidationError{ID: id, Fields: []smolvm.FieldError{{Field: field, Problem: problem}}}
}

// agentOptions returns the options of package agent, for a copy between two VMs; an empty id is
// that of this host.
func agentOptions(o smolvm.CopyOptions, from, to string) agent.CopyOptions {
	options := agent.CopyOptions{
		IntoDir:   o.IntoDir,
		KeepLinks: o.KeepLinks,
		Limits:    tree.Limits{MaxEntries: o.MaxFiles, MaxBytes: o.MaxBytes},
	}
	if o.Warn != nil {
		options.Note = func(side agent.Side, note tree.Note) {
			id := from
			if side == agent.Target {
				id = to
			}
			o.Warn(smolvm.CopyWarning{File: smolvm.CopyPath{VM: id, Path: note.Path}, Text: note.Text, Failed: note.Failed})
		}
	}
	return options
}
