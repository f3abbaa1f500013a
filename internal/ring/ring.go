// Package ring keeps logs that can't grow without bound, however much a guest writes
// into them.
//
// A log is two files: the current one, and beside it the previous one, whose name ends
// in ".1". When the current one is full it becomes the previous one, and a new one is
// begun; what was in the previous one is gone. Both together hold at least the last
// [Log]'s limit of bytes, and at most twice that.
package ring

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Limits of the logs that smolvm keeps, in bytes for each of the two files.
const (
	// ConsoleBytes is the limit of a guest's console. A boot prints some 30 KB.
	ConsoleBytes = 4 << 20
	// LogBytes is the limit of the logs of programs of the host.
	LogBytes = 1 << 20
)

// Previous returns the path of a log's older file, which the one at path has replaced.
func Previous(path string) string { return path + ".1" }

// Log is a log that is written to. Its methods may be called from any goroutine.
type Log struct {
	limit int64

	mu      sync.Mutex // guards the following
	file    *os.File
	size    int64 // of the file
	written int64 // by this Log
	lost    int64 // bytes that could not be written
	cause   error // of that
	last    []byte
	closed  bool
}

// kept is how many bytes of its end a Log has in memory when it is closed.
const kept = 4 << 10

// slack is by how many bytes the current file may exceed the limit, so that it ends where
// a line does.
const slack = 64 << 10

// Open opens the log at path for writing, and makes it if need be. What is in it stays.
func Open(path string, limit int64) (*Log, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	l := Over(file, limit)
	if l.limit > 0 && l.size > l.limit+slack {
		if err := l.shrink(path); err != nil {
			return nil, errors.Join(err, file.Close())
		}
	}
	return l, nil
}

// shrink makes the end of a file that has grown without a limit the previous one.
func (l *Log) shrink(path string) error {
	previous, err := os.OpenFile(Previous(path), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(previous, io.NewSectionReader(l.file, l.size-l.limit, l.limit))
	if err = errors.Join(err, previous.Close()); err == nil {
		err = l.file.Truncate(0)
	}
	l.size = 0
	return err
}

// Over returns a Log that writes to an open file, and is its owner from then on. The
// file keeps its descriptor when the log goes on in another one. A file that is none on
// disk, a terminal or a pipe, is written to without a bound.
func Over(file *os.File, limit int64) *Log {
	l := &Log{file: file, limit: limit}
	if info, err := file.Stat(); err == nil {
		l.size = info.Size()
		if !info.Mode().IsRegular() {
			l.limit = 0
		}
	}
	return l
}

// Write implements [io.Writer]. It always succeeds: what can't be written is lost, and
// the log tells so when it can be written again.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return len(p), nil
	}
	rest := p
	if l.limit > 0 && l.size+int64(len(p)) > l.limit {
		// The line that has been begun still belongs to this file.
		end := bytes.IndexByte(rest, '\n') + 1
		if end > 0 || l.size+int64(len(rest)) > l.limit+slack {
			l.put(rest[:end])
			rest = rest[end:]
			l.turn()
		}
	}
	l.put(rest)
	return len(p), nil
}

func (l *Log) put(p []byte) {
	if len(p) == 0 {
		return
	}
	if l.lost > 0 {
		if n, err := fmt.Fprintf(l.file, "\n[smolvm: %d bytes of this log were lost: %v]\n", l.lost, l.cause); err == nil {
			l.size, l.written, l.lost = l.size+int64(n), l.written+int64(n), 0
		}
	}
	n, err := l.file.Write(p)
	l.size, l.written = l.size+int64(n), l.written+int64(n)
	if err != nil {
		l.lost, l.cause = l.lost+int64(len(p)-n), cause(err)
	}
}

// cause returns an error without the name of the file, which may be another one by now.
func cause(err error) error {
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return path.Err
	}
	return err
}

// turn makes the current file the previous one, and begins another. If it can't, the
// current file loses what is in it: a log that is short is better than a host's disk
// that is full.
func (l *Log) turn() {
	if path := l.path(); path == "" || l.replace(path) != nil {
		_ = l.file.Truncate(0)
	}
	l.size = 0
}

// path returns where the file is now: it may have been renamed since it was opened. It is
// empty if the file has been deleted.
func (l *Log) path() string {
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(l.file.Fd())))
	if err != nil {
		return ""
	}
	there, err := os.Lstat(path)
	if err != nil {
		return ""
	}
	ours, err := l.file.Stat()
	if err != nil || !os.SameFile(there, ours) {
		return ""
	}
	return path
}

func (l *Log) replace(path string) error {
	if err := os.Rename(path, Previous(path)); err != nil {
		return err
	}
	next, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR|os.O_APPEND, 0o600)
	if err == nil {
		defer func() { _ = next.Close() }()
		flags, flagsErr := unix.FcntlInt(l.file.Fd(), unix.F_GETFD, 0)
		if flagsErr != nil {
			return flagsErr
		}
		dupFlags := 0
		if flags&unix.FD_CLOEXEC != 0 {
			dupFlags = unix.O_CLOEXEC
		}
		return unix.Dup3(int(next.Fd()), int(l.file.Fd()), dupFlags)
	}
	_ = os.Rename(Previous(path), path)
	return err
}

// Tail returns the end of what this Log has written: at most n bytes, or some thousand
// when it is closed.
func (l *Log) Tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return string(l.last[max(0, len(l.last)-n):])
	}
	return string(l.tail(n))
}

func (l *Log) tail(n int) []byte {
	n = int(min(int64(n), l.written))
	text := make([]byte, n)
	here := int(min(int64(n), l.size))
	got, _ := l.file.ReadAt(text[n-here:], l.size-int64(here))
	text = text[:n-here+got]
	if here == n {
		return text
	}
	// The rest is in the previous file, if that is still there.
	path := l.path()
	previous, err := os.Open(Previous(path))
	if err != nil || path == "" {
		return text[n-here:]
	}
	defer func() { _ = previous.Close() }()
	info, err := previous.Stat()
	if err != nil {
		return text[n-here:]
	}
	there := int(min(int64(n-here), info.Size()))
	if _, err := previous.ReadAt(text[n-here-there:n-here], info.Size()-int64(there)); err != nil {
		return text[n-here:]
	}
	return text[n-here-there:]
}

// Close closes the file. What is written from then on is lost.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.last, l.closed = l.tail(kept), true
	return l.file.Close()
}

// Append opens the log at path for programs that write to it by themselves: one that is
// full is made the previous one first. It bounds a log of which each of them writes little.
func Append(path string, limit int64) (*os.File, error) {
	if info, err := os.Stat(path); err == nil && info.Size() > limit {
		// If somebody else has just done so, the log is a little shorter.
		if err := os.Rename(path, Previous(path)); err != nil && !os.IsNotExist(err) {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
}

// QuoteBytes and QuoteLines are how much of the end of a log an error quotes: so many lines,
// of so many bytes in all.
const (
	QuoteBytes = 4 << 10
	QuoteLines = 8
)

// LastLines joins the last n lines of a text into one line.
func LastLines(text string, n int) string {
	lines := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}
