package deb

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

const (
	archiveMark = "!<arch>\n"
	memberMark  = "`\n"
	headerSize  = 60
	// maxMembers bounds how many members are looked at; a package has three, and may have some
	// of others' making.
	maxMembers = 32
)

// member is a file in an archive of ar.
type member struct {
	io.ReaderAt
	name string
	size int64 // in bytes
}

// readArchive lists the members of an archive of ar, in the form that deb(5) describes: short
// names, which may end in a slash.
func readArchive(r io.ReaderAt, size int64) ([]member, error) {
	mark := make([]byte, len(archiveMark))
	if _, err := r.ReadAt(mark, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if string(mark) != archiveMark {
		return nil, errors.New("is not a package: it does not begin as an archive of ar")
	}
	var members []member
	header := make([]byte, headerSize)
	for at := int64(len(archiveMark)); at < size; {
		if len(members) == maxMembers {
			return nil, fmt.Errorf("has more than %d members", maxMembers)
		}
		if _, err := r.ReadAt(header, at); err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("is cut short")
			}
			return nil, err
		}
		length, err := strconv.ParseInt(strings.TrimRight(string(header[48:58]), " "), 10, 64)
		if err != nil || length < 0 || !bytes.HasSuffix(header, []byte(memberMark)) {
			return nil, fmt.Errorf("has a damaged header at byte %d", at)
		}
		at += headerSize
		if length > size-at {
			return nil, errors.New("is cut short")
		}
		name := strings.TrimSuffix(strings.TrimRight(string(header[:16]), " "), "/")
		members = append(members, member{ReaderAt: io.NewSectionReader(r, at, length), name: name, size: length})
		at += length + length%2
	}
	return members, nil
}
