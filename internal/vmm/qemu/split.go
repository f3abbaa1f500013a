package qemu

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// ramID is the name that the guest's memory has on our command lines, and with it in
// migration streams.
const ramID = "ram"

// What a migration stream is made of; see QEMU's docs/devel/migration.rst and
// migration/savevm.c.
const (
	streamMagic   = 0x5145564d // "QEVM"
	streamVersion = 3

	markSectionStart  = 0x01
	markSectionPart   = 0x02
	markSectionEnd    = 0x03
	markConfiguration = 0x07
	markCommand       = 0x08
	markFooter        = 0x7e
)

// What the memory's section is made of; see migration/ram.c. A record begins with the
// offset of its page, whose lower bits are flags.
const (
	ramZero     = 0x02 // a page full of one byte, which follows
	ramSize     = 0x04 // the list of all blocks
	ramPage     = 0x08 // a page, which follows
	ramEnd      = 0x10 // the end of this part of the section
	ramContinue = 0x20 // of the same block as the record before
	ramFlush    = 0x200

	ramPageSize  = 4096
	ramFlagsMask = ramPageSize - 1
	// ramVersion is the version of the section that we know, since QEMU 2.0.
	ramVersion = 4
)

// maxStreamString bounds what a stream may make us hold.
const maxStreamString = 1 << 16

var errStream = errors.New("migration stream is not as expected; this version of QEMU is not supported for snapshots")

// splitStream copies a migration stream to state, without the pages of the guest's
// memory. Those go to memory, each to its place, so that a VM can map that file instead
// of reading it. What is left is a migration stream too: QEMU does not mind that it
// says nothing about some pages.
//
// A page may come several times, as the guest changes it while it is saved. The file
// must be new, and have the size of the guest's memory.
func splitStream(stream io.Reader, state io.Writer, memory *os.File) error {
	return newSplitter(stream, state, memory).split()
}

type splitter struct {
	in     *bufio.Reader
	out    *bufio.Writer
	memory pageWriter
	log    pageLog
	// guestHeld is called when the guest is held and all has come that was sent before,
	// and memoryEnds when all of the memory has come. They may be nil.
	guestHeld, memoryEnds func() error

	block string // whose pages are being read
	held  bool   // what is being read was sent while the guest was held
	err   error  // the first error in passing something on
}

// readAhead is how much of a stream is read at once, in bytes; see sendBuffer.
const readAhead = 32 << 10

func newSplitter(stream io.Reader, state io.Writer, memory *os.File) *splitter {
	size := size(memory.Name())
	return &splitter{
		in:     bufio.NewReaderSize(stream, readAhead),
		out:    bufio.NewWriterSize(state, 64<<10),
		memory: pageWriter{file: memory, size: size, written: make([]bool, size/ramPageSize)},
		log:    pageLog{last: make([]uint32, size/ramPageSize)},
	}
}

// split splits the stream to its end.
func (s *splitter) split() error {
	err := s.run()
	if err == nil {
		err = s.memory.flush()
	}
	if err == nil && s.memoryEnds != nil {
		err = s.memoryEnds()
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		_, err = io.Copy(s.out, s.in)
	}
	if err == nil {
		err = s.out.Flush()
	}
	if err != nil {
		return fmt.Errorf("split migration stream: %w", err)
	}
	return nil
}

// run reads up to the end of the memory's section; what follows is of the devices.
func (s *splitter) run() error {
	if s.pass32() != streamMagic || s.pass32() != streamVersion {
		return s.failed()
	}
	for {
		mark := s.pass8()
		switch mark {
		case markConfiguration:
			s.passString(int(s.pass32()))
		case markCommand:
			s.pass(2)
			s.passString(s.pass16())
		case markSectionStart, markSectionPart, markSectionEnd:
			if err := s.section(mark); err != nil {
				return err
			}
			if mark == markSectionEnd {
				return nil
			}
		default:
			return s.failed()
		}
		if s.err != nil {
			return s.failed()
		}
	}
}

func (s *splitter) failed() error {
	if s.err != nil {
		return s.err
	}
	return errStream
}

// section reads one part of the memory's section, the only one that has parts.
func (s *splitter) section(mark byte) error {
	s.pass32() // its number
	if mark == markSectionStart {
		name := s.passString(int(s.pass8()))
		s.pass32() // its instance
		if version := s.pass32(); name != "ram" || version != ramVersion {
			return s.failed()
		}
	}
	// The last part begins when the guest has been held.
	s.held = mark == markSectionEnd
	if s.held && s.err == nil && s.guestHeld != nil {
		if err := s.guestHeld(); err != nil {
			return err
		}
	}
	for done := false; !done; {
		var err error
		if done, err = s.record(); err != nil {
			return err
		}
	}
	if s.pass8() != markFooter {
		return s.failed()
	}
	s.pass32()
	return s.err
}

// record reads one record, and passes it on unless it is a page of the guest's memory.
func (s *splitter) record() (last bool, err error) {
	var head [8]byte
	if _, err := io.ReadFull(s.in, head[:]); err != nil {
		return false, err
	}
	word := binary.BigEndian.Uint64(head[:])
	offset, flags := int64(word&^ramFlagsMask), word&ramFlagsMask
	switch flags &^ ramContinue {
	case ramEnd, ramFlush:
		s.write(head[:])
		return flags == ramEnd, s.err
	case ramSize:
		s.write(head[:])
		return false, s.blocks(offset)
	case ramPage, ramZero:
	default:
		return false, errStream
	}
	var name []byte
	if flags&ramContinue == 0 {
		if name, err = s.blockName(); err != nil {
			return false, err
		}
	}
	size := ramPageSize
	if flags&ramZero != 0 {
		size = 1
	}
	content, err := s.in.Peek(size)
	if err != nil {
		return false, err
	}
	if s.block == ramID {
		if flags&ramZero != 0 {
			err = s.memory.fill(offset, content[0])
		} else {
			err = s.memory.put(offset, content)
		}
		if err == nil {
			err = s.log.note(offset/ramPageSize, s.held)
		}
	} else {
		s.write(head[:])
		s.write(name)
		s.write(content)
		err = s.err
	}
	if err == nil {
		_, err = s.in.Discard(size)
	}
	return false, err
}

// blockName reads the name of the block that the pages from here on are of, and
// returns it as it stands in the stream.
func (s *splitter) blockName() ([]byte, error) {
	length, err := s.in.ReadByte()
	if err != nil {
		return nil, err
	}
	raw := make([]byte, 1+int(length))
	raw[0] = length
	if _, err := io.ReadFull(s.in, raw[1:]); err != nil {
		return nil, err
	}
	s.block = string(raw[1:])
	return raw, nil
}

// blocks passes the list of blocks on; total is the sum of their sizes.
func (s *splitter) blocks(total int64) error {
	for total > 0 && s.err == nil {
		name, raw := s.passString(int(s.pass8())), s.pass(8)
		if s.err != nil {
			break
		}
		size := int64(binary.BigEndian.Uint64(raw))
		if size <= 0 || size > total {
			return errStream
		}
		if name == ramID && size != s.memory.size {
			return errStream
		}
		total -= size
	}
	return s.err
}

// pass copies n bytes and returns them. After an error it returns zeros.
func (s *splitter) pass(n int) []byte {
	b := make([]byte, n)
	if s.err == nil {
		_, s.err = io.ReadFull(s.in, b)
		s.write(b)
	}
	return b
}

func (s *splitter) write(b []byte) {
	if s.err == nil {
		_, s.err = s.out.Write(b)
	}
}

func (s *splitter) pass8() byte    { return s.pass(1)[0] }
func (s *splitter) pass16() int    { return int(binary.BigEndian.Uint16(s.pass(2))) }
func (s *splitter) pass32() uint32 { return binary.BigEndian.Uint32(s.pass(4)) }

func (s *splitter) passString(n int) string {
	if s.err == nil && (n < 0 || n > maxStreamString) {
		s.err = errStream
	}
	if s.err != nil {
		return ""
	}
	return string(s.pass(n))
}

// pageWriter puts pages into a file that starts out as one hole. Pages that follow each
// other are written together.
type pageWriter struct {
	file    *os.File
	size    int64  // of the guest's memory; a page beyond it is none
	written []bool // which pages are no holes any more

	start   int64 // where pending begins
	pending []byte
}

// maxPending is how much is written at once.
const maxPending = 1 << 20

func (w *pageWriter) put(offset int64, page []byte) error {
	if offset < 0 || offset+ramPageSize > w.size {
		return errStream
	}
	if len(w.pending) == maxPending || offset != w.start+int64(len(w.pending)) {
		if err := w.flush(); err != nil {
			return err
		}
		w.start = offset
	}
	w.written[offset/ramPageSize] = true
	w.pending = append(w.pending, page...)
	return nil
}

// fill makes a page of one byte only. A page of zeros stays a hole.
func (w *pageWriter) fill(offset int64, value byte) error {
	if offset < 0 || offset+ramPageSize > w.size {
		return errStream
	}
	if value == 0 && !w.written[offset/ramPageSize] {
		return nil
	}
	return w.put(offset, bytes.Repeat([]byte{value}, ramPageSize))
}

func (w *pageWriter) flush() error {
	if len(w.pending) == 0 {
		return nil
	}
	_, err := w.file.WriteAt(w.pending, w.start)
	w.pending = w.pending[:0]
	return err
}
