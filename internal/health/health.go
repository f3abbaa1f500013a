// Package health finds out, by checks at intervals, whether what runs in a VM works; its rules are
// docker's. It knows how to count, and not how a check is made.
package health

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/smolvm/smolvm"
)

// ErrVoid reports that a check has found nothing: the guest was held, or it can't be known.
var ErrVoid = errors.New("the check has found nothing")

// errTimeout ends a check that takes too long.
var errTimeout = errors.New("the check took too long")

// Options of a [Monitor].
type Options struct {
	// Check says when checks are made and how they count. Its times are greater than zero, but
	// for StartPeriod.
	Check smolvm.Healthcheck
	// Run makes one check, and returns the command's exit status and what it printed. It returns
	// when its context is done. An error that matches [ErrVoid] is no result.
	Run func(context.Context) (code int, output string, err error)
	// Changed is called, by one goroutine, when the status has changed.
	Changed func(smolvm.Health)
}

// Monitor makes the checks of one VM.
type Monitor struct {
	opts Options

	mu    sync.Mutex
	state smolvm.Health
}

// New returns a monitor, which makes no checks before [Monitor.Watch].
func New(opts Options) *Monitor {
	return &Monitor{opts: opts, state: smolvm.Health{Status: smolvm.HealthStarting, Results: []smolvm.HealthResult{}}}
}

// Health returns what the checks have found.
func (m *Monitor) Health() smolvm.Health {
	m.mu.Lock()
	defer m.mu.Unlock()
	found := m.state
	found.Results = slices.Clone(found.Results)
	return found
}

// Watch makes checks until ctx is done: the first one when an interval is over, and each other
// when one is over since the end of the one before.
func (m *Monitor) Watch(ctx context.Context) {
	began := time.Now()
	timer := time.NewTimer(m.interval(time.Since(began)))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if result, ok := m.check(ctx); ok && ctx.Err() == nil && m.add(result, result.StartedAt.Sub(began)) {
			m.opts.Changed(m.Health())
		}
		timer.Reset(m.interval(time.Since(began)))
	}
}

// interval returns how long to wait for the next check, when the VM has run for some time.
func (m *Monitor) interval(ran time.Duration) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state.Status == smolvm.HealthStarting && ran < m.opts.Check.StartPeriod {
		return m.opts.Check.StartInterval
	}
	return m.opts.Check.Interval
}

// check makes one check, and reports whether it has found something.
func (m *Monitor) check(ctx context.Context) (smolvm.HealthResult, bool) {
	timed, cancel := context.WithTimeoutCause(ctx, m.opts.Check.Timeout, errTimeout)
	defer cancel()
	result := smolvm.HealthResult{StartedAt: time.Now()}
	code, output, err := m.opts.Run(timed)
	result.EndedAt = time.Now().UTC()
	switch {
	case errors.Is(err, ErrVoid):
		return result, false
	case errors.Is(err, errTimeout):
		code, output = -1, strings.TrimSuffix(fmt.Sprintf("the check took longer than %s: %s", m.opts.Check.Timeout, output), ": ")
	case err != nil:
		code, output = -1, strings.TrimSuffix(err.Error()+": "+output, ": ")
	}
	output = strings.ToValidUTF8(output, "\uFFFD")
	result.ExitCode, result.Output = code, strings.ToValidUTF8(output[:min(len(output), smolvm.MaxHealthOutput)], "")
	return result, true
}

// add counts a result of a check that was begun when the VM had run for some time, and reports
// whether the status has changed.
func (m *Monitor) add(result smolvm.HealthResult, ran time.Duration) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.state.Status
	switch {
	case result.ExitCode == 0:
		m.state.Status, m.state.FailingStreak = smolvm.HealthHealthy, 0
	case before == smolvm.HealthStarting && ran < m.opts.Check.StartPeriod: // it does not count
	default:
		if m.state.FailingStreak++; m.state.FailingStreak >= m.opts.Check.Retries {
			m.state.Status = smolvm.HealthUnhealthy
		}
	}
	result.StartedAt = result.StartedAt.UTC()
	m.state.Results = append(m.state.Results, result)
	m.state.Results = slices.Clone(m.state.Results[max(0, len(m.state.Results)-smolvm.MaxHealthResults):])
	return m.state.Status != before
}
