package cli

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

// interruptError reports that a signal ended what was being done.
type interruptError struct{ signal unix.Signal }

func (e *interruptError) Error() string { return "interrupted by " + unix.SignalName(e.signal) }

// Is has the error match that of a cancelled context.
func (e *interruptError) Is(target error) bool { return target == context.Canceled }

// signals decides what a signal to this process does. At first it cancels the
// context of the whole run, and a second one ends the process. While a command runs
// in a guest, signals go to that command instead.
type signals struct {
	received chan os.Signal
	cancel   context.CancelCauseFunc

	mu      sync.Mutex
	forward func(unix.Signal) // nil: cancel
}

// passedOn returns the signals, beside those that end a program, that are passed on to a
// command.
func passedOn() []os.Signal {
	return []os.Signal{unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2}
}

func watchSignals(ctx context.Context) (context.Context, *signals) {
	ctx, cancel := context.WithCancelCause(ctx)
	s := &signals{received: make(chan os.Signal, 8), cancel: cancel}
	signal.Notify(s.received, unix.SIGINT, unix.SIGTERM)
	if !signal.Ignored(unix.SIGHUP) { // else we are run by nohup
		signal.Notify(s.received, unix.SIGHUP)
	}
	go func() {
		for sig := range s.received {
			if number, ok := sig.(unix.Signal); ok {
				s.deliver(number)
			}
		}
	}()
	return ctx, s
}

func (s *signals) deliver(sig unix.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.forward != nil {
		s.forward(sig)
		return
	}
	s.cancel(&interruptError{sig})
	signal.Stop(s.received)
}

func (s *signals) stop() {
	signal.Stop(s.received)
	close(s.received)
	s.cancel(nil)
}

// passOn passes signals on to a command in a guest, by the names that it returns,
// until release is called. A command that does not end within a grace period after a
// signal that asks it to, or when it is asked again, is ended by the context.
func (s *signals) passOn(ctx context.Context) (_ context.Context, names <-chan smolvm.Signal, release func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	passed := make(chan smolvm.Signal, 8)
	var deadline *time.Timer
	forward := func(sig unix.Signal) {
		select {
		case passed <- smolvm.Signal(strings.TrimPrefix(unix.SignalName(sig), "SIG")):
		default: // the command does not take them; the grace period still runs
		}
		switch {
		case sig != unix.SIGINT && sig != unix.SIGTERM && sig != unix.SIGHUP:
		case deadline != nil:
			cancel(&interruptError{sig})
		default:
			deadline = time.AfterFunc(smolvm.DefaultStopTimeout, func() { cancel(&interruptError{sig}) })
		}
	}
	s.mu.Lock()
	s.forward = forward
	s.mu.Unlock()
	signal.Notify(s.received, passedOn()...)
	return ctx, passed, func() {
		signal.Reset(passedOn()...)
		s.mu.Lock()
		s.forward = nil
		if deadline != nil {
			deadline.Stop()
		}
		s.mu.Unlock()
		cancel(nil)
	}
}

// timeoutError reports that a command took longer than it was given.
type timeoutError struct{ limit time.Duration }

func (e *timeoutError) Error() string {
	return fmt.Sprintf("command did not end within %s, and was ended", e.limit)
}
