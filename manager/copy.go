package manager

import (
	"context"
	"fmt"
	"io"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/tree"
)

// CopyPath names a file or a directory of a VM or of this host.
type CopyPath struct {
	// VM is the id of the VM. Empty: this host.
	VM string
	// Path is any bytes but NUL. In a VM a path that is not absolute is below root's
	// home directory. A path that ends in "/." stands for the contents of a directory.
	Path string
}

func (p CopyPath) String() string {
	if p.VM == "" {
		return tree.Display(p.Path)
	}
	return fmt.Sprintf("%s of VM %q", tree.Display(p.Path), p.VM)
}

// CopyOptions says how to copy. The zero value is useful.
type CopyOptions struct {
	// IntoDir says that the target must be an existing directory, as it must for
	// several sources.
	IntoDir bool
	// KeepLinks makes the symbolic links in a tree from a guest wherever they lead. By
	// default those are left out that lead out of the tree, absolute ones too: what
	// later follows such a link reads or writes a file that the guest has chosen.
	KeepLinks bool
	// MaxBytes bounds how long all files from a guest may be together, in bytes. Zero:
	// any length.
	MaxBytes int64
	// MaxFiles bounds how many files, directories and links may come from a guest.
	// Zero: [DefaultCopyFiles].
	MaxFiles int64
	// Warn is called for what is left out or done in another way, by one goroutine at a
	// time. Of very many files only the first and their number are told. It may be nil.
	Warn func(CopyWarning)
}

// DefaultCopyFiles is how many files, directories and links a copy from a guest may
// have, unless [CopyOptions] says otherwise.
const DefaultCopyFiles = tree.DefaultMaxEntries

// CopyWarning tells of a file that was left out of a copy, or treated in another way.
// A guest may have chosen the text: it may hold anything.
type CopyWarning struct {
	// File is where it is, on its own side. Its Path is empty in a warning of no file.
	File CopyPath
	// Text says what happened.
	Text string
	// Failed says that the file should have been copied, and that the copy therefore
	// ends in an error that matches [ErrCopyIncomplete]. It is not set for what can't
	// be part of a copy: files that vanish meanwhile, sockets, FIFOs, devices, the
	// kernel's own file systems, and links that lead out of the tree.
	Failed bool
}

func (w CopyWarning) String() string {
	switch {
	case w.File.Path == "":
		return w.Text
	case w.File.VM == "":
		return tree.Display(w.File.Path) + ": " + w.Text
	}
	return w.File.VM + ":" + tree.Display(w.File.Path) + ": " + w.Text
}

// The errors of copies; match them by errors.Is. That a path does not exist matches
// fs.ErrNotExist, on either side.
var (
	// ErrCopyIncomplete says that some files could not be read or written. The rest
	// was copied.
	ErrCopyIncomplete = agent.ErrIncomplete
	// ErrCopyLimit says that a guest has sent more than MaxBytes or MaxFiles.
	ErrCopyLimit = tree.ErrLimit
)

// CopyTo copies a file or a tree of the host into the guest: [Manager.Copy] with the
// usual options.
func (m *Manager) CopyTo(ctx context.Context, id, hostPath, guestPath string) error {
	return m.Copy(ctx, CopyPath{Path: hostPath}, CopyPath{VM: id, Path: guestPath}, CopyOptions{})
}

// CopyFrom copies a file or a tree of the guest to the host: [Manager.Copy] with the
// usual options.
func (m *Manager) CopyFrom(ctx context.Context, id, guestPath, hostPath string) error {
	return m.Copy(ctx, CopyPath{VM: id, Path: guestPath}, CopyPath{Path: hostPath}, CopyOptions{})
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
// What can't be read or written is left out, and the rest is copied; see [CopyOptions].
// When ctx is done the copy ends at once, and what it has copied by then is left, but
// for the file that was being written.
func (m *Manager) Copy(ctx context.Context, from, to CopyPath, opts CopyOptions) error {
	if err := checkCopy(from, to); err != nil {
		return err
	}
	options := opts.agent(from.VM, to.VM)
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

// GetTree writes a file or a tree of the guest to w, as a tar stream in PAX format. It
// has what [Manager.Copy] would copy, below the source's name; hard links and owners are
// not kept. When ctx is done it returns, although a call of w may go on.
func (m *Manager) GetTree(ctx context.Context, id, guestPath string, w io.Writer, opts CopyOptions) error {
	from := CopyPath{VM: id, Path: guestPath}
	if err := checkPath(id, "source", guestPath); err != nil {
		return err
	}
	client, err := m.client(ctx, id, "copy from")
	if err != nil {
		return err
	}
	if err := client.GetTar(ctx, guestPath, w, opts.agent(id, "")); err != nil {
		return fmt.Errorf("copy %s to a tar stream: %w", from, err)
	}
	return nil
}

// PutTree puts what is in a tar stream into a directory of the guest, which must exist.
// All of it belongs to root; hard links are kept. When ctx is done it returns, although
// a call of r may go on.
func (m *Manager) PutTree(ctx context.Context, id, guestPath string, r io.Reader, opts CopyOptions) error {
	to := CopyPath{VM: id, Path: guestPath}
	if err := checkPath(id, "target", guestPath); err != nil {
		return err
	}
	client, err := m.client(ctx, id, "copy to")
	if err != nil {
		return err
	}
	if err := client.PutTar(ctx, r, guestPath, opts.agent("", id)); err != nil {
		return fmt.Errorf("copy a tar stream to %s: %w", to, err)
	}
	return nil
}

func checkCopy(from, to CopyPath) error {
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

// agent returns the options of package agent, for a copy between two VMs; an empty id is
// that of this host.
func (o CopyOptions) agent(from, to string) agent.CopyOptions {
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
			o.Warn(CopyWarning{File: CopyPath{VM: id, Path: note.Path}, Text: note.Text, Failed: note.Failed})
		}
	}
	return options
}
