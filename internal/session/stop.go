package session

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/vmm"
)

const (
	// StopGrace is how long a VM gets to shut down when nobody says.
	StopGrace = 10 * time.Second
	// quitTime is how long a VMM gets to quit by itself before it is killed; it needs
	// that to write out what the guest has written to its disks. A stop may take that
	// much longer than its grace.
	quitTime = 800 * time.Millisecond
	// lastWordsTime is how long the orderly part of a stop gets to report why it failed
	// when its time is over.
	lastWordsTime = 50 * time.Millisecond

	// A guest whose power button was pressed and that shows no sign of life for deafTime
	// does not listen to it. One that has shown some may only just have booted, so its
	// button is pressed again first.
	deafTime = time.Second
	// idleCPU is the CPU time that a VMM uses in deafTime at most while its guest does nothing.
	// Measured with an idle Linux under emulation, where that is most: up to 10 ms.
	idleCPU = 50 * time.Millisecond
)

var (
	errNoAgent    = errors.New("there is no agent")
	errUnfinished = errors.New("the agent did not finish shutting the guest down")
	errNoAnswer   = errors.New("neither the guest nor its VMM answered in time")
	errButton     = errors.New("the guest did not answer its power button")
	errDeaf       = errors.New("the guest shows no sign of having noticed its power button")
)

// Stop ends the VM within about the grace: by asking the agent, then by the power
// button, then by ending the VMM. Whatever guest and VMM do meanwhile, the last step
// comes when the grace is over. It may be called while another call is under way; the
// shorter grace wins. It returns when the VM has ended.
func (s *Session) Stop(how shim.Stop, reason string) {
	s.note(reason)
	if how.Grace > 0 {
		err := s.shutDown(how)
		if err != nil && !s.ended() {
			s.log.Info("the guest does not shut down", "grace", how.Grace, "error", err)
			s.note(fmt.Sprintf("it did not shut down in %s (%v)", how.Grace, err))
		}
	}
	s.kill()
}

// note adds to what is said of the VM's end. Once it has ended, there is nothing to add.
func (s *Session) note(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended() {
		s.notes = append(s.notes, text)
	}
}

// shutDown tries the orderly ways beside a clock, as none of them is sure to return: a
// VMM that hangs answers no command, and a guest may keep its channel busy. If the VM
// has not ended at the end of the grace, the error says why each way has failed.
func (s *Session) shutDown(how shim.Stop) error {
	ctx, cancel := context.WithTimeout(context.Background(), how.Grace)
	defer cancel()
	if err := s.halts.err(); err != nil && !s.hasRoom() {
		return err // it would only take what little is left for the others
	}
	s.halts.clear()
	result := make(chan error, 1)
	go func() { result <- s.askToShutDown(ctx, how) }() // it ends with the VM at the latest
	select {
	case err := <-result:
		return err
	case <-s.instance.Done():
		return nil
	case <-s.halts.halted(): // and nobody will make room for it
		return s.halts.err()
	case <-ctx.Done():
	}
	select {
	case err := <-result:
		return err
	case <-time.After(lastWordsTime):
		return errNoAnswer
	}
}

// askToShutDown asks the agent, then presses the power button.
func (s *Session) askToShutDown(ctx context.Context, how shim.Stop) error {
	if pauser, ok := s.instance.(vmm.Pauser); ok {
		_ = pauser.Resume(ctx) // a guest that is paused can't do anything
		s.setPaused(false)
	}
	agentErr := errNoAgent
	patient := how.Patient
	if s.line.current() != nil {
		// Processes get half of the time, so that what follows has the rest.
		asking, cancel := context.WithTimeout(ctx, how.Grace/2)
		var link *agent.Link
		if link, agentErr = s.agentLink(asking); agentErr == nil {
			agentErr = link.Shutdown(asking, how.Grace/2, how.Signal)
		}
		cancel()
		if agentErr == nil {
			if s.endsWithin(ctx, how.Grace*3/4) {
				return nil
			}
			agentErr, patient = errUnfinished, true // it is at work
		}
	}
	buttonErr := s.instance.Shutdown(ctx)
	if buttonErr == nil {
		buttonErr = s.awaitPowerOff(ctx, patient)
	}
	if buttonErr == nil {
		return nil
	}
	return fmt.Errorf("%w; %w", agentErr, buttonErr)
}

// endsWithin waits for the VM's end.
func (s *Session) endsWithin(ctx context.Context, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case <-s.instance.Done():
		return true
	case <-ctx.Done():
		return false
	}
}

// awaitPowerOff waits for the VM's end when its power button has been pressed. Unless it
// is patient, it gives up a guest that does nothing: it has not noticed, and never will.
func (s *Session) awaitPowerOff(ctx context.Context, patient bool) error {
	ticker := time.NewTicker(deafTime)
	defer ticker.Stop()
	wasBusy := false
	for before := s.signsOfLife(); ; {
		select {
		case <-s.instance.Done():
			return nil
		case <-ctx.Done():
			return errButton
		case <-ticker.C:
		}
		now := s.signsOfLife()
		busy := now.differ(before)
		switch {
		case busy:
		case wasBusy:
			if err := s.instance.Shutdown(ctx); err != nil {
				return err
			}
		case !patient:
			return errDeaf
		}
		before, wasBusy = now, busy
	}
}

// signs are what can be seen of a guest from outside.
type signs struct {
	cpu     time.Duration // that its VMM has used
	console time.Time     // when something was written to its console
	size    int64         // of the console
}

func (s *Session) signsOfLife() (seen signs) {
	seen.cpu, _ = proc.CPUTime(s.instance.PID()) // none: it is ending
	if info, err := os.Stat(s.console()); err == nil {
		seen.console, seen.size = info.ModTime(), info.Size()
	}
	return seen
}

// differ reports whether the guest has done something in the deafTime since before.
func (s signs) differ(before signs) bool {
	return s.cpu-before.cpu > idleCPU || s.size != before.size || !s.console.Equal(before.console)
}
