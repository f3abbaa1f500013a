package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// warmUp runs a program of its own. An emulated CPU translates all code that it runs for the
// first time, and that is most of what a first command costs; here it happens on a CPU that
// has nothing to do while the kernel loads modules and mounts the disk.
func (a *agent) warmUp() {
	if runtime.NumCPU() < 2 {
		return
	}
	noop := &job{argv: wire.Noop(), noStdin: true, stdout: io.Discard, stderr: io.Discard}
	if noop.start(a.reaper) == nil {
		noop.wait()
	}
}

// lifeTime bounds how long a program may take that ends at once. On a busy host it takes
// a second.
const lifeTime = 20 * time.Second

// rehearsal is a first program that runs while the host goes on with other things. The
// zero value is one that has succeeded.
type rehearsal struct {
	mu    sync.Mutex
	ended chan struct{} // nil: there is none
	err   error         // to be read when it has ended
}

// begin starts a rehearsal in place of the last one.
func (r *rehearsal) begin(run func() error) {
	ended := make(chan struct{})
	r.mu.Lock()
	r.ended, r.err = ended, nil
	r.mu.Unlock()
	go func() {
		err := run()
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.ended == ended {
			r.err = err
		}
		close(ended)
	}()
}

// wait returns the rehearsal's error when it has ended.
func (r *rehearsal) wait() error {
	r.mu.Lock()
	ended := r.ended
	r.mu.Unlock()
	if ended == nil {
		return nil
	}
	<-ended
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// rehearse runs a program in a guest that was restored, and returns when it has ended:
// the host hands no guest out that can't start programs. Its emulator begins with no
// translated code and its memory is all to be fetched, so the first program to start pays
// 50 ms that the kernel's fork, exec and exit need. Another CPU pays them here, while the
// guest takes on its identity and the host logs in.
func (a *agent) rehearse() error {
	noop := &job{argv: []string{"true"}, noStdin: true, stdout: io.Discard, stderr: io.Discard}
	err := noop.start(a.reaper)
	if errors.Is(err, errNotFound) { // not every image has it
		noop = &job{argv: wire.Noop(), noStdin: true, stdout: io.Discard, stderr: io.Discard}
		err = noop.start(a.reaper)
	}
	if err != nil {
		return fmt.Errorf("programs can't be started in the guest: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		noop.wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-time.After(lifeTime):
		return fmt.Errorf("programs don't run in the guest: the first one has not ended in %s", lifeTime)
	}
}

// readAhead brings a program into memory that the first command is likely to be, or
// to be run by.
func readAhead(path string) {
	file, err := os.Open(path)
	if err != nil {
		return
	}
	defer func() { _ = file.Close() }()
	_, _ = io.Copy(io.Discard, file)
}
