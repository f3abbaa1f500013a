package ring

import (
	"errors"
	"io"
	"os"
)

// Piped is a log that another program writes to through a pipe. The program has no other way
// to the file, so nothing that a guest makes it print fills the host's disk.
type Piped struct {
	*Log
	pipe  *os.File
	hurry chan struct{} // closed when nothing more is to come
	done  chan struct{} // closed when all that came has been written
}

// OpenPiped opens the log at path as [Open] does, and returns it with the end of its pipe that
// is the program's.
func OpenPiped(path string, limit int64) (*Piped, *os.File, error) {
	log, err := Open(path, limit)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, log.Close())
	}
	return NewPiped(log, ours), theirs, nil
}

// NewPiped returns a log that is written through a pipe, of which it gets the end to read
// from. It owns both.
func NewPiped(log *Log, pipe *os.File) *Piped {
	return &Piped{Log: log, pipe: pipe, hurry: make(chan struct{}), done: make(chan struct{})}
}

// Start begins to write what comes. Watch, unless it is nil, is given the same before.
func (p *Piped) Start(watch io.Writer) {
	var from io.Reader = p.pipe
	if watch != nil {
		from = io.TeeReader(from, watch)
	}
	go func() {
		p.Pump(from, p.hurry)
		close(p.done)
	}()
}

// Drain writes what the program, which has ended, has left in the pipe.
func (p *Piped) Drain() {
	close(p.hurry)
	<-p.done
}

// Close closes both files. It is for a log that was not started, or has been drained.
func (p *Piped) Close() error { return errors.Join(p.pipe.Close(), p.Log.Close()) }
