package shim

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/smolvm/smolvm/internal/vmm"
)

const (
	// stopGrace is how long a VM gets to shut down when nobody says.
	stopGrace = 10 * time.Second
	// quitTime is how long a VMM gets to quit by itself before it is killed; it needs
	// that to write out what the guest has written to its disks.
	quitTime = 2 * time.Second
)

// stop ends the VM within about the grace: by asking the agent, then by the power
// button, then by ending the VMM. It may be called while another call is under way;
// the shorter grace wins. It returns when the VM has ended.
func (s *shim) stop(ctx context.Context, grace time.Duration, reason string) {
	s.note(reason)
	if grace > 0 {
		ctx, cancel := context.WithTimeout(ctx, grace)
		err := s.shutDown(ctx, grace)
		cancel()
		if err != nil && !isClosed(s.instance.Done()) {
			s.log.Info("the guest does not shut down", "grace", grace, "error", err)
			s.note(fmt.Sprintf("it did not shut down in %s (%v)", grace, err))
		}
	}
	// Not bound to the caller: a VM that is half stopped is of no use to anybody.
	s.kill()
}

// note adds to what is said of the VM's end. Once it has ended, there is nothing to add.
func (s *shim) note(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !isClosed(s.instance.Done()) {
		s.notes = append(s.notes, text)
	}
}

// shutDown tries the orderly ways until ctx is done. If the VM has not ended then, it
// says why each way has failed.
func (s *shim) shutDown(ctx context.Context, grace time.Duration) error {
	if pauser, ok := s.instance.(vmm.Pauser); ok {
		_ = pauser.Resume(ctx) // a guest that is paused can't do anything
	}
	agentErr := errors.New("there is no agent")
	if s.link != nil {
		// Processes get half of the time, so that what follows has the rest.
		agentErr = s.link.Shutdown(ctx, grace/2)
		if agentErr == nil {
			if s.endsWithin(ctx, grace*3/4) {
				return nil
			}
			agentErr = errors.New("the agent did not finish shutting the guest down")
		}
	}
	buttonErr := s.instance.Shutdown(ctx)
	if buttonErr == nil {
		if s.endsWithin(ctx, grace) {
			return nil
		}
		buttonErr = errors.New("the guest did not answer its power button")
	}
	return fmt.Errorf("%w; %w", agentErr, buttonErr)
}

// endsWithin waits for the VM's end.
func (s *shim) endsWithin(ctx context.Context, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case <-s.instance.Done():
		return true
	case <-ctx.Done():
		return false
	}
}
