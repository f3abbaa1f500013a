package flowlog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/ring"
)

// maxChunk is how much is written at once, in bytes, and so how much is kept of what a full disk
// did not take.
const maxChunk = 256 << 10

// writer appends records to the files of a log. Of what it has begun to write nothing is ever
// taken back: others may have read it.
type writer struct {
	path  string
	limit int64 // of each file, in bytes

	file  io.WriteCloser // nil: it is not open
	size  int64          // of it, with all that is pending
	chain Chain          // of the last record, pending ones included

	pending []byte // the end of what could be written in part only, or that is to be written
	lost    int64  // records that were not written
	why     string // the first of them
	torn    int64  // bytes that were at the end of the file and no whole line
}

// lose counts records that were not written.
func (w *writer) lose(count int64, why string) {
	if count > 0 && w.lost == 0 {
		w.why = why
	}
	w.lost += count
}

// write appends records. Those that can't be written are counted as lost; the error says why.
func (w *writer) write(records []smolvm.FlowRecord) error {
	for i, r := range records {
		if err := w.add(r); err != nil {
			w.lose(int64(len(records)-i), cause(err))
			return err
		}
	}
	return w.flush()
}

// add makes the line of a record, after one of those that were lost.
func (w *writer) add(r smolvm.FlowRecord) error {
	if err := w.open(); err != nil {
		return err
	}
	if w.torn > 0 {
		torn := smolvm.FlowRecord{Kind: smolvm.FlowLost, At: time.Now().UTC(), Lost: 1,
			Detail: fmt.Sprintf("the last line was not whole: %d bytes were removed", w.torn)}
		if err := w.put(torn); err != nil {
			return err
		}
		w.torn = 0
	}
	if w.lost > 0 {
		lost := smolvm.FlowRecord{Kind: smolvm.FlowLost, At: time.Now().UTC(), Lost: w.lost, Detail: text(w.why, maxText)}
		if err := w.put(lost); err != nil {
			return err
		}
		w.lost, w.why = 0, ""
	}
	return w.put(r)
}

// put appends the line of a record to what is pending.
func (w *writer) put(r smolvm.FlowRecord) error {
	if len(w.pending) > maxChunk {
		if err := w.flush(); err != nil {
			return err
		}
	}
	r.Number, r.Prev = w.chain.number+1, w.chain.hash
	line, hash, err := seal(r)
	if err != nil {
		return err
	}
	if w.size > 0 && w.size+int64(len(line)) > w.limit {
		if err := w.turn(); err != nil {
			return err
		}
	}
	w.pending = append(w.pending, line...)
	w.size += int64(len(line))
	w.chain = Chain{number: r.Number, hash: hash}
	return nil
}

// flush writes what is pending. What is not written stays so.
func (w *writer) flush() error {
	if len(w.pending) == 0 {
		return nil
	}
	if err := w.open(); err != nil {
		return err
	}
	n, err := w.file.Write(w.pending)
	w.pending = w.pending[:copy(w.pending, w.pending[n:])]
	if err != nil {
		return err
	}
	if cap(w.pending) > maxChunk/4 {
		w.pending = nil
	}
	return nil
}

// turn makes the current file the previous one, and begins another.
func (w *writer) turn() error {
	if err := w.flush(); err != nil {
		return err
	}
	if err := os.Rename(w.path, ring.Previous(w.path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	_ = w.file.Close()
	w.file, w.size = nil, 0
	return w.begin(os.O_EXCL)
}

// begin begins a file.
func (w *writer) begin(flags int) error {
	file, err := w.openFile(flags)
	if err == nil {
		w.file = file
	}
	return err
}

func (w *writer) openFile(flags int) (*os.File, error) {
	return os.OpenFile(w.path, os.O_RDWR|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|flags, 0o600)
}

// open opens the log, unless it is open, to go on with what is in it.
func (w *writer) open() error {
	if w.file != nil {
		return nil
	}
	if w.chain.number > 0 { // the one before was turned over, and no other could be made
		return w.begin(0)
	}
	file, err := w.openFile(0)
	if err != nil {
		return err
	}
	if err := w.resume(file); err != nil {
		return errors.Join(err, file.Close())
	}
	w.file = file
	return nil
}

// resume finds the last record that was written, and removes what a writer that was killed has
// left of a line.
func (w *writer) resume(file *os.File) error {
	last, rest, size, err := lastLine(file)
	if err != nil {
		return err
	}
	if size == 0 { // a writer that was killed while it turned the log over
		if previous, err := os.Open(ring.Previous(w.path)); err == nil {
			last, _, _, err = lastLine(previous)
			if err = errors.Join(err, previous.Close()); err != nil {
				return err
			}
		}
	}
	if rest > 0 {
		if err := file.Truncate(size - rest); err != nil {
			return err
		}
	}
	w.size, w.torn = size-rest, rest
	if len(last) == 0 {
		return nil
	}
	// One that was changed is followed as it says: whoever reads the log finds it out.
	r, _ := open(last)
	w.chain = Chain{number: max(r.Number, 1), hash: hashIn(last)}
	return nil
}

// hashIn returns the hash that a line has, or one of its own.
func hashIn(line []byte) string {
	if r, err := open(line); err == nil {
		return r.Hash
	}
	return hashOf(line)
}

// lastLine returns the last whole line of a file, without its line break, and how many bytes follow
// it. It is empty if there is none, or if it is longer than a line may be.
func lastLine(file *os.File) (line []byte, rest, size int64, err error) {
	info, err := file.Stat()
	if err != nil {
		return nil, 0, 0, err
	}
	size = info.Size()
	begin := max(0, size-2*MaxLine)
	end := make([]byte, size-begin)
	if _, err := file.ReadAt(end, begin); err != nil && !errors.Is(err, io.EOF) {
		return nil, 0, 0, err
	}
	last := bytes.LastIndexByte(end, '\n') + 1
	rest = int64(len(end) - last)
	if last == 0 {
		return nil, rest, size, nil
	}
	line = end[:last-1]
	return line[bytes.LastIndexByte(line, '\n')+1:], rest, size, nil
}

// close writes what is left, and closes the file.
func (w *writer) close() {
	if w.lost > 0 {
		_ = w.add(smolvm.FlowRecord{Kind: smolvm.FlowStop, At: time.Now().UTC()})
	}
	_ = w.flush()
	if w.file != nil {
		_ = w.file.Close()
	}
}

// cause returns the text of an error without the name of the file.
func cause(err error) string {
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return path.Err.Error()
	}
	return err.Error()
}
