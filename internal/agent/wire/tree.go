package wire

// TreeChannel is the channel type for copying files and trees; its open request
// carries a [TreeRequest] as JSON. What goes over the channel is streams of package
// tree: the tree in one direction, and with Extract the receiver's answer in the other.
const TreeChannel = "tree@smolvm"

// TreeRequest asks for one direction of a copy; see [TreeChannel]. With Extract what
// comes is put where the fields say, which are those of a tree.Target; otherwise what is
// at Path is sent. Names are bytes, as the kernel has them, not text.
type TreeRequest struct {
	Extract   bool   `json:"extract,omitempty"`
	Path      []byte `json:"path"`
	Name      []byte `json:"name,omitempty"`
	Contents  bool   `json:"contents,omitempty"`
	IntoDir   bool   `json:"into_dir,omitempty"`
	Untrusted bool   `json:"untrusted,omitempty"`
	KeepLinks bool   `json:"keep_links,omitempty"`
}
