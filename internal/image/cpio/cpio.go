// Package cpio writes archives that the kernel takes as an initramfs: the format
// "newc" of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
package cpio

import (
	"fmt"
	"io"
	"slices"
)

// File types, as in stat(2).
const (
	typeDir        = 0o040000
	typeRegular    = 0o100000
	typeCharDevice = 0o020000
)

// Writer writes one archive. Its methods may be called without looking at errors:
// the first one is returned by Close. All files belong to root.
type Writer struct {
	w     io.Writer
	inode uint32
	err   error
}

// NewWriter returns a Writer to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Dir adds a directory. Names have no slash at their beginning.
func (c *Writer) Dir(name string, mode uint32) { c.add(entry{name: name, mode: typeDir | mode}) }

// File adds a regular file. The directory that it is in must come before it.
func (c *Writer) File(name string, mode uint32, content []byte) {
	c.add(entry{name: name, mode: typeRegular | mode, content: content})
}

// CharDevice adds a device node.
func (c *Writer) CharDevice(name string, mode, major, minor uint32) {
	c.add(entry{name: name, mode: typeCharDevice | mode, major: major, minor: minor})
}

// Close ends the archive. It does not close the underlying writer.
func (c *Writer) Close() error {
	c.add(entry{name: "TRAILER!!!"})
	return c.err
}

type entry struct {
	name         string
	mode         uint32
	major, minor uint32
	content      []byte
}

func (c *Writer) add(e entry) {
	c.inode++
	header := fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.inode, e.mode, 0, 0, 1, 0, len(e.content), 0, 0, e.major, e.minor, len(e.name)+1, 0)
	c.write(pad4(append(append(header, e.name...), 0)))
	c.write(pad4(e.content))
}

func (c *Writer) write(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
}

func pad4(b []byte) []byte { return append(slices.Clip(b), make([]byte, -len(b)&3)...) }
