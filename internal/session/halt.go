package session

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/smolvm/smolvm/internal/diskspace"
	"github.com/smolvm/smolvm/internal/vmm"
)

// haltTime is how long a guest that was halted and goes on is watched: what halted it
// before halts it again at once.
const haltTime = 500 * time.Millisecond

// enoughRoom is how much of a drive's file system must be free, in bytes, for a guest that
// was halted to be able to shut down.
const enoughRoom = 16 << 20

// errHalted is the kind of error of a guest that was halted by its VMM.
var errHalted = errors.New("the guest can't go on")

// halts is why the VMM has paused the guest by itself, if it has.
type halts struct {
	mu    sync.Mutex
	cause string
	halt  chan struct{} // closed while it is halted
	tell  chan struct{} // receives at each halt
}

func newHalts() *halts { return &halts{halt: make(chan struct{}), tell: make(chan struct{}, 1)} }

// set notes that the guest was halted.
func (h *halts) set(cause string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.cause == "" {
		close(h.halt)
	}
	h.cause = cause
	select {
	case h.tell <- struct{}{}:
	default: // it will be told of this one
	}
}

// clear notes that the guest is to go on, and reports whether it had been halted.
func (h *halts) clear() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	halted := h.cause != ""
	if h.cause = ""; halted {
		h.halt = make(chan struct{})
	}
	return halted
}

// halted is closed when the guest is halted, or is already.
func (h *halts) halted() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.halt
}

// why is why the guest is halted; empty if it is not.
func (h *halts) why() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cause
}

// err is why the guest is halted; nil if it is not.
func (h *halts) err() error {
	if why := h.why(); why != "" {
		return fmt.Errorf("%w: %s", errHalted, why)
	}
	return nil
}

// watchHalts notes the halts of a VM until it has ended.
func (s *Session) watchHalts(instance vmm.Instance) {
	halter, ok := instance.(vmm.Halter)
	if !ok {
		return
	}
	for {
		select {
		case <-instance.Done():
			return
		case halt := <-halter.Halts():
			cause := s.causeOf(halt)
			s.log.Warn("the VMM paused the guest", "cause", cause)
			s.halts.set(cause)
		}
	}
}

// causeOf puts a halt into words.
func (s *Session) causeOf(halt vmm.Halt) string {
	path := ""
	if drives := s.spec.VMM.Drives; halt.Drive >= 0 && halt.Drive < len(drives) {
		path = drives[halt.Drive].Path
	}
	return halt.Cause(path)
}

// hasRoom reports whether there is room again for what the guest writes.
func (s *Session) hasRoom() bool {
	for _, drive := range s.spec.VMM.Drives {
		if free, _, err := diskspace.Of(filepath.Dir(drive.Path)); err == nil && !drive.ReadOnly && free < enoughRoom {
			return false
		}
	}
	return true
}

// Halted receives when the VMM has paused the guest by itself.
func (s *Session) Halted() <-chan struct{} { return s.halts.tell }

// TakeHalt makes a guest that its VMM has paused a paused one, and returns why; empty if it
// goes on again.
func (s *Session) TakeHalt() string {
	why := s.halts.why()
	if why != "" {
		s.setPaused(true)
	}
	return why
}
