package qemu

import (
	"errors"
	"os"

	"github.com/smolvm/smolvm/internal/ring"
)

// log is a bounded log that QEMU writes to through a pipe. QEMU has no other way to the
// file, so nothing that a guest makes it print fills the host's disk.
type log struct {
	*ring.Log
	pipe  *os.File
	hurry chan struct{} // closed when nothing more is to come
	done  chan struct{} // closed when all that came has been written
}

// openLog returns the log, and the end of its pipe that is QEMU's.
func openLog(path string, limit int64) (*log, *os.File, error) {
	file, err := ring.Open(path, limit)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, file.Close())
	}
	return &log{Log: file, pipe: ours, hurry: make(chan struct{}), done: make(chan struct{})}, theirs, nil
}

// pump begins to write what comes.
func (l *log) pump() {
	go func() {
		l.Pump(l.pipe, l.hurry)
		close(l.done)
	}()
}

// drain writes what QEMU, which has ended, has left in the pipe.
func (l *log) drain() {
	close(l.hurry)
	<-l.done
}

// Close closes both files. It is for a log that is not pumped, or not any more.
func (l *log) Close() error { return errors.Join(l.pipe.Close(), l.Log.Close()) }
