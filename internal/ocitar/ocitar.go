// Package ocitar has the names by which the archive of an OCI image's layer says what an archive by
// tar has no entries for; see the image specification's layer.md.
package ocitar

const (
	// Whiteout begins the name of an entry that hides what has the rest of its name in the layers
	// below. No file of an image has such a name.
	Whiteout = ".wh."
	// Opaque is the name of an entry whose directory shows nothing of the layers below.
	Opaque = ".wh..wh..opq"
	// XattrRecord begins the name of a header's record that holds an extended attribute. The rest is
	// the attribute's name.
	XattrRecord = "SCHILY.xattr."
)
