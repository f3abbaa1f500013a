package smolvm

import "fmt"

// ChangeKind is what a guest has done to a file of a directory of the host.
type ChangeKind string

// The kinds of changes.
const (
	ChangeAdded   ChangeKind = "added"
	ChangeChanged ChangeKind = "changed"
	ChangeDeleted ChangeKind = "deleted"
)

// Change is a file or directory that is not in a guest as it is on the host. What is in an added
// directory is a change of its own, and what is in a deleted one is not.
type Change struct {
	Kind ChangeKind `json:"kind"`
	// Path is the path in the guest.
	Path string `json:"path"`
}

// String returns the change as docker diff prints it.
func (c Change) String() string {
	letter := map[ChangeKind]string{ChangeAdded: "A", ChangeChanged: "C", ChangeDeleted: "D"}[c.Kind]
	return fmt.Sprintf("%s %s", letter, c.Path)
}

// ApplyOptions say how a guest's changes are brought back. The zero value refuses conflicts.
type ApplyOptions struct {
	// Force brings back what has changed on the host meanwhile, too. The host's changes of these
	// files are lost.
	Force bool
}
