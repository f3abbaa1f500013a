package session

import (
	"context"
	"errors"
	"sync"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/health"
)

// maxHealthOutput is how much a check of the guest's health may print, in bytes: the guest can't
// keep the shim at work with it.
const maxHealthOutput = 1 << 20

// errTalkative ends a check that prints too much.
var errTalkative = errors.New("the check printed more than 1 MiB")

// WatchHealth makes the checks of the guest's health until ctx is done, if it is to have any, and
// calls changed when their status has changed.
func (s *Session) WatchHealth(ctx context.Context, changed func(smolvm.Health)) {
	if s.spec.Health == nil || s.spec.Hello == nil {
		return
	}
	monitor := health.New(health.Options{Check: s.spec.Health.Check, Run: s.checkHealth, Changed: changed})
	s.mu.Lock()
	s.health = monitor
	s.mu.Unlock()
	monitor.Watch(ctx)
}

// foundHealth returns what the checks of the guest's health have found; nil if none are made.
func (s *Session) foundHealth() *smolvm.Health {
	s.mu.Lock()
	monitor := s.health
	s.mu.Unlock()
	if monitor == nil {
		return nil
	}
	found := monitor.Health()
	return &found
}

// checkHealth makes one check of the guest's health. One that finds the guest held, or loses its
// connection by a save, is void.
func (s *Session) checkHealth(ctx context.Context) (code int, output string, err error) {
	holds := s.holds.Load()
	if s.paused.Load() || s.halts.err() != nil {
		return 0, "", health.ErrVoid
	}
	_, endBefore := s.line.told()
	client, err := s.newClient()
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = client.Close() }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	printed := &firstWords{tooMany: func() { cancel(errTalkative) }}
	status, err := client.Exec(ctx, smolvm.Command{
		Args: s.spec.Health.Check.CommandLine(), User: s.spec.Health.User, Dir: s.spec.Health.Dir, Stdout: printed, Stderr: printed,
	})
	_, end := s.line.told()
	if s.paused.Load() || s.holds.Load() != holds || err != nil && end != endBefore {
		return 0, "", health.ErrVoid
	}
	return status.Code, printed.text(), err
}

// firstWords keeps the beginning of what is written.
type firstWords struct {
	tooMany func() // called when more was written than may be

	mu   sync.Mutex
	kept []byte
	all  int
}

// Write implements [io.Writer].
func (w *firstWords) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.kept = append(w.kept, p[:min(len(p), smolvm.MaxHealthOutput-len(w.kept))]...)
	if w.all += len(p); w.all > maxHealthOutput {
		w.tooMany()
	}
	return len(p), nil
}

func (w *firstWords) text() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return string(w.kept)
}
