package smolvm

import (
	"errors"
	"fmt"
	"strconv"
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
		return displayPath(p.Path)
	}
	return fmt.Sprintf("%s of VM %q", displayPath(p.Path), p.VM)
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
const DefaultCopyFiles = 10_000_000

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
		return displayPath(w.File.Path) + ": " + w.Text
	}
	return w.File.VM + ":" + displayPath(w.File.Path) + ": " + w.Text
}

// The errors of copies; match them by errors.Is. That a path does not exist matches
// fs.ErrNotExist, on either side.
var (
	// ErrCopyIncomplete says that some files could not be read or written. The rest
	// was copied.
	ErrCopyIncomplete = errors.New("the rest was copied")
	// ErrCopyLimit says that a guest has sent more than MaxBytes or MaxFiles.
	ErrCopyLimit = errors.New("more than is allowed")
)

// displayPath returns a path for a message, quoted if it is not plain text. A guest may have
// chosen it.
func displayPath(path string) string {
	quoted := strconv.Quote(path)
	if quoted[1:len(quoted)-1] == path {
		return path
	}
	return quoted
}
