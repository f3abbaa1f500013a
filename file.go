package smolvm

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"
)

// MaxReadFile is how many bytes [ReadFile] returns at most: a guest is not to fill the
// memory of the program that reads its files. [Files.GetTree] has no such limit.
const MaxReadFile = 64 << 20

// maxFollowed is how many links [ReadFile] follows, as the Linux kernel does.
const maxFollowed = 40

// WriteOptions are the options of [WriteFile].
type WriteOptions struct {
	// Mode is that of a file that is new; one that exists keeps its mode. Zero: 0644.
	Mode fs.FileMode
}

// ReadFile returns the content of a file of a guest. It follows links, as the guest does.
// The error matches [fs.ErrNotExist] if there is no such file, and [ErrCopyLimit] if the
// file has more than [MaxReadFile] bytes.
func ReadFile(ctx context.Context, files Files, id, name string) ([]byte, error) {
	at := name
	for range maxFollowed {
		content, link, err := readOnce(ctx, files, id, at)
		if err != nil {
			return nil, fmt.Errorf("read %s of VM %q: %w", displayPath(name), id, err)
		}
		if link == "" {
			return content, nil
		}
		if !path.IsAbs(link) {
			// Not cleaned: what ".." is of a directory that is a link, the guest knows.
			link = at[:strings.LastIndexByte(at, '/')+1] + link
		}
		at = link
	}
	return nil, fmt.Errorf("read %s of VM %q: too many links", displayPath(name), id)
}

// readOnce returns the content of a file, or where a link leads.
func readOnce(ctx context.Context, files Files, id, name string) (content []byte, link string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // a directory is not read to its end
	stream, err := files.GetTree(ctx, id, name, CopyOptions{MaxBytes: MaxReadFile, MaxFiles: 1, KeepLinks: true})
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = stream.Close() }()
	archive := tar.NewReader(stream)
	header, err := archive.Next()
	switch {
	case errors.Is(err, io.EOF):
		return nil, "", errors.New("it is neither a file nor a link to one")
	case err != nil:
		return nil, "", err
	case header.Typeflag == tar.TypeSymlink:
		return nil, header.Linkname, nil
	case header.Typeflag == tar.TypeDir:
		return nil, "", errors.New("it is a directory")
	}
	if content, err = io.ReadAll(io.LimitReader(archive, MaxReadFile+1)); err != nil {
		return nil, "", err
	}
	if len(content) > MaxReadFile {
		return nil, "", fmt.Errorf("%w: more than %d bytes", ErrCopyLimit, MaxReadFile)
	}
	// What comes after it is how the copy went.
	_, err = io.Copy(io.Discard, stream)
	return content, "", err
}

// WriteFile makes a file of a guest, or replaces one when the new content has come whole; its
// directory must exist. A link of that name is replaced, not followed.
func WriteFile(ctx context.Context, files Files, id, name string, content []byte, opts WriteOptions) error {
	dir, base := path.Split(name)
	if base == "" || base == "." || base == ".." {
		return &ValidationError{ID: id, Fields: []FieldError{{Field: "path", Problem: displayPath(name) + " does not name a file"}}}
	}
	if dir == "" {
		dir = "." // root's home, as everywhere
	}
	mode := opts.Mode.Perm()
	if mode == 0 {
		mode = 0o644
	}
	var head bytes.Buffer
	err := tar.NewWriter(&head).WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: base, Size: int64(len(content)), Mode: int64(mode), ModTime: time.Now(), Format: tar.FormatPAX,
	})
	if err == nil {
		const block = 512 // archives are made of these, and two empty ones end them
		padding := make([]byte, (block-len(content)%block)%block+2*block)
		err = files.PutTree(ctx, id, dir, io.MultiReader(&head, bytes.NewReader(content), bytes.NewReader(padding)), CopyOptions{})
	}
	if err != nil {
		return fmt.Errorf("write %s of VM %q: %w", displayPath(name), id, err)
	}
	return nil
}
