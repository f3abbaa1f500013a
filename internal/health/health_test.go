package health_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/health"
)

// outcome is how one check ends.
type outcome struct {
	code   int
	output string
	err    error
	hangs  bool // until its context is done
}

// watch runs a monitor whose checks end as told, in order and the last one again and again, for
// some time. It returns what was found, the statuses that were told, and when checks were begun.
func watch(t *testing.T, check smolvm.Healthcheck, runs time.Duration, outcomes ...outcome) (found smolvm.Health, told []smolvm.HealthStatus, begun []time.Duration) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		began, n := time.Now(), 0
		m := health.New(health.Options{
			Check: check,
			Run: func(ctx context.Context) (int, string, error) {
				begun = append(begun, time.Since(began))
				o := outcomes[min(n, len(outcomes)-1)]
				n++
				if o.hangs {
					<-ctx.Done()
					return 0, o.output, context.Cause(ctx)
				}
				return o.code, o.output, o.err
			},
			Changed: func(h smolvm.Health) { told = append(told, h.Status) },
		})
		ctx, cancel := context.WithTimeout(t.Context(), runs)
		defer cancel()
		m.Watch(ctx)
		found = m.Health()
	})
	return found, told, begun
}

func TestMonitor(t *testing.T) {
	const starting, healthy, unhealthy = smolvm.HealthStarting, smolvm.HealthHealthy, smolvm.HealthUnhealthy
	ten := smolvm.Healthcheck{Interval: 10 * time.Second, Timeout: 3 * time.Second, StartInterval: time.Second, Retries: 3}
	slow := ten
	slow.StartPeriod = 25 * time.Second
	slow.StartInterval = 10 * time.Second
	good, bad := outcome{}, outcome{code: 1, output: "no"}
	for name, test := range map[string]struct {
		check    smolvm.Healthcheck
		runs     time.Duration
		outcomes []outcome
		told     []smolvm.HealthStatus
		status   smolvm.HealthStatus
		streak   int
		results  int
	}{
		"before the first":               {ten, 9 * time.Second, []outcome{good}, nil, starting, 0, 0},
		"at once healthy":                {ten, 15 * time.Second, []outcome{good}, []smolvm.HealthStatus{healthy}, healthy, 0, 1},
		"not failed often enough":        {ten, 25 * time.Second, []outcome{bad}, nil, starting, 2, 2},
		"unhealthy":                      {ten, 45 * time.Second, []outcome{bad}, []smolvm.HealthStatus{unhealthy}, unhealthy, 4, 4},
		"a success resets":               {ten, 65 * time.Second, []outcome{bad, bad, good, bad, bad, bad}, []smolvm.HealthStatus{healthy, unhealthy}, unhealthy, 3, 5},
		"recovers":                       {ten, 45 * time.Second, []outcome{bad, bad, bad, good}, []smolvm.HealthStatus{unhealthy, healthy}, healthy, 0, 4},
		"failures of a start":            {slow, 45 * time.Second, []outcome{bad}, nil, starting, 2, 4},
		"a start is over with a success": {slow, 55 * time.Second, []outcome{good, bad}, []smolvm.HealthStatus{healthy, unhealthy}, unhealthy, 4, 5},
		"void":                           {ten, 95 * time.Second, []outcome{{err: health.ErrVoid}}, nil, starting, 0, 0},
		"can't be run":                   {ten, 35 * time.Second, []outcome{{err: errors.New("no agent")}}, []smolvm.HealthStatus{unhealthy}, unhealthy, 3, 3},
		"hangs":                          {ten, 40 * time.Second, []outcome{{hangs: true}}, []smolvm.HealthStatus{unhealthy}, unhealthy, 3, 3},
	} {
		t.Run(name, func(t *testing.T) {
			found, told, _ := watch(t, test.check, test.runs, test.outcomes...)
			if !slices.Equal(told, test.told) || found.Status != test.status || found.FailingStreak != test.streak || len(found.Results) != test.results {
				t.Errorf("told %v, found %+v; want %+v", told, found, test)
			}
		})
	}
}

// Checks are at the intervals of a start until one succeeds or the start is over, and the interval
// is the time from the end of one to the next.
func TestIntervals(t *testing.T) {
	check := smolvm.Healthcheck{
		Interval: 10 * time.Second, Timeout: 3 * time.Second, StartPeriod: 10 * time.Second, StartInterval: 2 * time.Second, Retries: 3,
	}
	seconds := func(all ...int) (times []time.Duration) {
		for _, n := range all {
			times = append(times, time.Duration(n)*time.Second)
		}
		return times
	}
	for name, test := range map[string]struct {
		outcomes []outcome
		want     []time.Duration
	}{
		"success ends the start":         {[]outcome{{code: 1}, {}}, seconds(2, 4, 14, 24)},
		"the start is over":              {[]outcome{{code: 1}}, seconds(2, 4, 6, 8, 10, 20)},
		"from the end of one that hangs": {[]outcome{{hangs: true}}, seconds(2, 7, 20)},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, begun := watch(t, check, 29*time.Second, test.outcomes...); !slices.Equal(begun, test.want) {
				t.Errorf("checks were at %v, want %v", begun, test.want)
			}
		})
	}
}

// What is kept of results is bounded, is text, and says how a check ended.
func TestResults(t *testing.T) {
	check := smolvm.Healthcheck{Interval: time.Second, Timeout: 3 * time.Second, Retries: 100}
	found, _, _ := watch(t, check, 20*time.Second,
		outcome{code: 7}, outcome{output: "later"}, outcome{code: 2, output: "\xff" + strings.Repeat("ü", smolvm.MaxHealthOutput)},
		outcome{hangs: true, output: "so far"}, outcome{hangs: true}, outcome{err: errors.New("no agent"), output: "x"}, outcome{code: 3, output: "last"}, outcome{err: health.ErrVoid})
	if len(found.Results) != smolvm.MaxHealthResults {
		t.Fatalf("%d results are kept", len(found.Results))
	}
	want := []smolvm.HealthResult{
		{ExitCode: 2}, {ExitCode: -1, Output: "the check took longer than 3s: so far"}, {ExitCode: -1, Output: "the check took longer than 3s"},
		{ExitCode: -1, Output: "no agent: x"}, {ExitCode: 3, Output: "last"},
	}
	for i, result := range found.Results {
		if result.ExitCode != want[i].ExitCode || want[i].Output != "" && result.Output != want[i].Output || result.EndedAt.Before(result.StartedAt) {
			t.Errorf("result %d is %+v, want %+v", i, result, want[i])
		}
	}
	if long := found.Results[0].Output; len(long) > smolvm.MaxHealthOutput || !utf8.ValidString(long) || len(long) < smolvm.MaxHealthOutput-4 {
		t.Errorf("%d bytes are kept of a long output", len(long))
	}
	if reason := found.Reason(); reason != "5 checks failed in a row, the last one with exit status 3: last" {
		t.Errorf("reason is %q", reason)
	}
}
