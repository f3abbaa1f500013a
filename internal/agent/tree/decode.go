package tree

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"syscall"
	"time"
)

// Event is the next thing that a stream says.
type Event struct {
	// Kind says which of the following there is.
	Kind EventKind
	// Entry begins, with EventEntry.
	Entry Entry
	// Data is content, with EventData. It is valid until the next call of Next.
	Data []byte
	// Hole is a length of zeros, with EventHole.
	Hole int64
	// Failure, with EventEndFile, says why the sender could not read the whole file.
	Failure string
}

// EventKind is what an [Event] is.
type EventKind int

// The kinds of events.
const (
	EventEntry EventKind = iota + 1
	EventData
	EventHole
	EventEndFile
	EventLeave
	EventEnd
)

// Decoder reads a stream of frames, and makes sure that it is one: names are names,
// what ends has begun, and no bound is passed. The memory that it takes is bounded
// whatever comes.
type Decoder struct {
	// Limits bounds what may come.
	Limits Limits
	// Note is called for each note; it may be nil.
	Note func(Note)
	// HardLinks allows hard links in the stream.
	HardLinks bool

	r        *bufio.Reader
	buf      []byte
	any      bool // the root has come
	ended    bool
	inFile   bool
	depth    int // of directories that have begun and not ended
	position int64
	entries  int64
	bytes    int64
}

// NewDecoder returns a Decoder that reads from r.
func NewDecoder(r io.Reader) *Decoder {
	return &Decoder{r: bufio.NewReaderSize(r, 64<<10)}
}

// ErrProtocol is matched by the error of a stream that is not one of a tree.
var ErrProtocol = errors.New("the stream of files makes no sense")

func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)
}

// remoteError is what the other side says of its failure.
type remoteError struct {
	text  string
	errno syscall.Errno
}

func (e *remoteError) Error() string { return e.text }

// Unwrap lets errors.Is find fs.ErrNotExist and the like.
func (e *remoteError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}

// IsRemote reports whether an error is what the other side says of its failure.
func IsRemote(err error) bool {
	var remote *remoteError
	return errors.As(err, &remote)
}

// Next returns the next event, or the error that the other side has sent. After
// EventEnd it is not to be called again. A stream that is cut off ends in
// io.ErrUnexpectedEOF.
func (d *Decoder) Next() (Event, error) {
	for {
		kind, payload, err := d.frame()
		if err != nil {
			return Event{}, err
		}
		switch kind {
		case frameNote:
			if err := d.note(payload); err != nil {
				return Event{}, err
			}
		case frameFail:
			return Event{}, parseFailure(payload)
		default:
			return d.event(kind, payload)
		}
	}
}

// Reply reads what a receiver answers: notes, and then the end. It returns nil if the
// receiver has taken all.
func (d *Decoder) Reply() error {
	for {
		kind, payload, err := d.frame()
		switch {
		case err != nil:
			return err
		case kind == frameNote:
			if err := d.note(payload); err != nil {
				return err
			}
		case kind == frameEnd:
			return nil
		case kind == frameFail:
			return parseFailure(payload)
		default:
			return protocolError("a frame %q in an answer", kind)
		}
	}
}

// frame reads one frame. Its payload is valid until the next call.
func (d *Decoder) frame() (kind byte, payload []byte, err error) {
	var header [headerLength]byte
	if _, err := io.ReadFull(d.r, header[:]); err != nil {
		return 0, nil, cutOff(err)
	}
	kind = header[0]
	length := binary.BigEndian.Uint32(header[1:])
	most := uint32(entryLength + maxName + maxPath)
	if kind == frameData {
		most = maxChunk
	}
	if length > most {
		return 0, nil, protocolError("a frame %q of %d bytes", kind, length)
	}
	if int(length) > cap(d.buf) {
		d.buf = make([]byte, max(int(length), 4<<10))
	}
	payload = d.buf[:length]
	if _, err := io.ReadFull(d.r, payload); err != nil {
		return 0, nil, cutOff(err)
	}
	return kind, payload, nil
}

func cutOff(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (d *Decoder) event(kind byte, payload []byte) (Event, error) {
	switch kind {
	case byte(File), byte(Dir), byte(Symlink), byte(HardLink):
		return d.entry(Kind(kind), payload)
	case frameData, frameHole:
		return d.content(kind, payload)
	case frameEndFile:
		if !d.inFile || len(payload) > maxText {
			return Event{}, protocolError("the end of a file that has not begun")
		}
		d.inFile = false
		return Event{Kind: EventEndFile, Failure: string(payload)}, nil
	case frameLeave:
		if d.inFile || d.depth == 0 || len(payload) != 0 {
			return Event{}, protocolError("the end of a directory that has not begun")
		}
		d.depth--
		return Event{Kind: EventLeave}, nil
	case frameEnd:
		if d.inFile || d.depth != 0 || !d.any || d.ended || len(payload) != 0 {
			return Event{}, protocolError("an end where there can be none")
		}
		d.ended = true
		return Event{Kind: EventEnd}, nil
	}
	return Event{}, protocolError("a frame of the unknown kind %q", kind)
}

func (d *Decoder) entry(kind Kind, payload []byte) (Event, error) {
	if d.inFile || d.any && d.depth == 0 {
		return Event{}, protocolError("an entry where there can be none")
	}
	entry, err := parseEntry(kind, payload)
	if err != nil {
		return Event{}, err
	}
	if !d.any && (entry.Name != "" || kind != File && kind != Dir) {
		return Event{}, protocolError("the root is neither a file nor a directory")
	}
	if d.any && !isName(entry.Name) {
		return Event{}, protocolError("%q is no name", entry.Name)
	}
	if kind == HardLink && !d.HardLinks {
		return Event{}, protocolError("%q is a hard link", entry.Name)
	}
	if err := d.count(); err != nil {
		return Event{}, err
	}
	d.any = true
	switch kind {
	case File:
		d.inFile, d.position = true, 0
	case Dir:
		if d.depth++; d.depth > maxDepth {
			return Event{}, fmt.Errorf("directories are nested deeper than %d: %w", maxDepth, ErrLimit)
		}
	default: // links have no more than their entry
	}
	return Event{Kind: EventEntry, Entry: entry}, nil
}

// isName reports whether a name can be that of an entry in a directory.
func isName(name string) bool {
	return name != "" && name != "." && name != ".." && !strings.ContainsAny(name, "/\x00")
}

func parseEntry(kind Kind, p []byte) (Entry, error) {
	if len(p) < entryLength {
		return Entry{}, protocolError("an entry of %d bytes", len(p))
	}
	nanoseconds := binary.BigEndian.Uint32(p[12:])
	nameLength := int(binary.BigEndian.Uint16(p[25:]))
	rest := p[entryLength:]
	if nanoseconds >= 1e9 || nameLength > min(len(rest), maxName) {
		return Entry{}, protocolError("a bad time or length in an entry")
	}
	entry := Entry{
		Kind:     kind,
		Mode:     binary.BigEndian.Uint32(p) & 0o7777,
		ModTime:  time.Unix(int64(binary.BigEndian.Uint64(p[4:])), int64(nanoseconds)),
		Size:     int64(binary.BigEndian.Uint64(p[16:])),
		Implicit: p[24] != 0,
		Name:     string(rest[:nameLength]),
		Link:     string(rest[nameLength:]),
	}
	isLink := kind == Symlink || kind == HardLink
	if isLink != (entry.Link != "") || len(entry.Link) > maxPath || strings.ContainsRune(entry.Link, 0) {
		return Entry{}, protocolError("%q is a link to %.64q", entry.Name, entry.Link)
	}
	return entry, nil
}

func (d *Decoder) content(kind byte, payload []byte) (Event, error) {
	event := Event{Kind: EventData, Data: payload}
	length := int64(len(payload))
	if kind == frameHole {
		if len(payload) != 8 {
			return Event{}, protocolError("a hole of %d bytes", len(payload))
		}
		length = int64(binary.BigEndian.Uint64(payload))
		event = Event{Kind: EventHole, Hole: length}
	}
	if !d.inFile || length <= 0 || length > math.MaxInt64-d.position {
		return Event{}, protocolError("content where there can be none")
	}
	d.position += length
	if d.Limits.MaxBytes > 0 && length > d.Limits.MaxBytes-d.bytes {
		return Event{}, fmt.Errorf("the files have more than %d bytes together: %w", d.Limits.MaxBytes, ErrLimit)
	}
	if d.Limits.MaxBytes > 0 {
		d.bytes += length
	}
	return event, nil
}

// count counts an entry or a note.
func (d *Decoder) count() error {
	most := d.Limits.MaxEntries
	if most <= 0 {
		most = DefaultMaxEntries
	}
	if d.entries++; d.entries > most {
		return fmt.Errorf("there are more than %d files: %w", most, ErrLimit)
	}
	return nil
}

func (d *Decoder) note(p []byte) error {
	if len(p) < 3 {
		return protocolError("a note of %d bytes", len(p))
	}
	pathLength := int(binary.BigEndian.Uint16(p[1:]))
	if pathLength > min(len(p)-3, maxPath) {
		return protocolError("a note of %d bytes", len(p))
	}
	if err := d.count(); err != nil {
		return err
	}
	if d.Note != nil {
		d.Note(Note{
			Failed: p[0] != 0,
			Path:   string(p[3 : 3+pathLength]),
			Text:   string(p[3+pathLength:]),
		})
	}
	return nil
}

func parseFailure(p []byte) error {
	// The kernel's numbers end at 4095.
	if len(p) < 4 || binary.BigEndian.Uint32(p) > 4095 {
		return protocolError("a failure that can't be read")
	}
	return &remoteError{text: string(p[4:]), errno: syscall.Errno(binary.BigEndian.Uint32(p))}
}

// skipFile reads to the end of the file that was begun.
func (d *Decoder) skipFile() error {
	for d.inFile {
		if _, err := d.Next(); err != nil {
			return err
		}
	}
	return nil
}

// skipDir reads to the end of the directory that was begun last.
func (d *Decoder) skipDir() error {
	for outer := d.depth - 1; d.depth > outer; {
		if _, err := d.Next(); err != nil {
			return err
		}
	}
	return nil
}
