package ring

import (
	"io"
	"time"
)

// A pump takes at most a chunk, and then nothing for a while: that is 400 KB a second,
// 30 times what a serial line of 115200 baud carries. What is beyond stays in the pipe, and
// when that is full whoever writes to it waits: a guest that floods its console is slowed
// down by its own UART, and costs the host neither a core nor its disk. A console on which
// a guest prints letter by letter wakes the pump no more than a hundred times a second.
const (
	chunk = 4 << 10
	pause = 10 * time.Millisecond
)

// Pump copies from r to the log until r ends or fails. It does not pause any more when
// hurry is closed.
func (l *Log) Pump(r io.Reader, hurry <-chan struct{}) {
	buffer := make([]byte, chunk)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		n, err := r.Read(buffer)
		_, _ = l.Write(buffer[:n]) // never fails
		if err != nil {
			return
		}
		timer.Reset(pause)
		select {
		case <-timer.C:
		case <-hurry:
		}
	}
}
