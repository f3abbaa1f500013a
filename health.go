package smolvm

import (
	"fmt"
	"strings"
	"time"
)

// HealthStatus is what the checks of a VM's health have found.
type HealthStatus string

// The statuses of a VM's health.
const (
	// HealthStarting is that of a VM whose checks have neither succeeded nor failed often enough.
	HealthStarting HealthStatus = "starting"
	// HealthHealthy is that of a VM whose last check has succeeded, or whose failures since then
	// are fewer than it takes.
	HealthHealthy HealthStatus = "healthy"
	// HealthUnhealthy is that of a VM whose checks have failed [Healthcheck].Retries times in a
	// row.
	HealthUnhealthy HealthStatus = "unhealthy"
)

// Bounds of what is kept of the checks of a VM's health.
const (
	// MaxHealthResults is how many results are kept, the newest.
	MaxHealthResults = 5
	// MaxHealthOutput is how much is kept of what a check has printed, in bytes: its beginning.
	MaxHealthOutput = 4096
)

// Health is what the checks of a VM's health have found since the VM was started.
type Health struct {
	Status HealthStatus `json:"status"`
	// FailingStreak is how many checks have failed in a row, without those that don't count as
	// the VM is starting.
	FailingStreak int `json:"failing_streak"`
	// Results are those of the last checks, the newest last; at most [MaxHealthResults].
	Results []HealthResult `json:"results"`
}

// HealthResult is the result of one check of a VM's health.
type HealthResult struct {
	// StartedAt and EndedAt are when the check was begun and over, by the host's clock in UTC.
	StartedAt time.Time `json:"started_at"`
	EndedAt   time.Time `json:"ended_at"`
	// ExitCode is the command's exit status; 0: it is healthy. It is -1 of a command that took too
	// long, or could not be run.
	ExitCode int `json:"exit_code"`
	// Output is the beginning of what the command printed on both streams, or why there is none.
	// It is the guest's text.
	Output string `json:"output"`
}

// Reason says in words why a VM is not healthy. It has the guest's text in it.
func (h Health) Reason() string {
	if len(h.Results) == 0 {
		return "no check has been made yet"
	}
	last := h.Results[len(h.Results)-1]
	text := fmt.Sprintf("%d checks failed in a row", h.FailingStreak)
	if h.FailingStreak == 1 {
		text = "a check failed"
	}
	if last.ExitCode >= 0 {
		text += fmt.Sprintf(", the last one with exit status %d", last.ExitCode)
	}
	const most = 200
	line, _, _ := strings.Cut(strings.TrimSpace(last.Output), "\n")
	if len(line) > most {
		line = strings.ToValidUTF8(line[:most], "") + "..."
	}
	if line == "" {
		return text
	}
	return text + ": " + line
}

// minHealthTime is the least that a time of a [Healthcheck] may be, as docker has it.
const minHealthTime = time.Millisecond

// problem says what is wrong with a check; empty: nothing.
func (h Healthcheck) problem() string {
	for _, given := range []struct {
		name string
		time time.Duration
	}{
		{"interval_ms", h.Interval}, {"timeout_ms", h.Timeout}, {"start_period_ms", h.StartPeriod}, {"start_interval_ms", h.StartInterval},
	} {
		if given.time != 0 && given.time < minHealthTime {
			return fmt.Sprintf("%s is %s, less than %s", given.name, given.time, minHealthTime)
		}
	}
	switch {
	case h.Retries < 0:
		return "retries is negative"
	case h.Shell && len(h.Command) != 1:
		return "a shell takes one line as its command"
	case len(h.Command) > 0 && h.Command[0] == "":
		return "the command is empty"
	}
	for _, word := range h.Command {
		if strings.Contains(word, "\x00") {
			return "a NUL is in the command"
		}
	}
	return ""
}

// validateHealth checks how a VM's health is found out.
func (c VMConfig) validateHealth(v *validator) {
	if c.Healthcheck == nil {
		return
	}
	v.check(c.UsesImage(), "healthcheck", "a VM with its own kernel has no agent to run it")
	v.check(!c.NoHealthcheck, "no_healthcheck", "excludes healthcheck; give one of the two")
	problem := c.Healthcheck.problem()
	v.check(problem == "", "healthcheck", "%s", problem)
}

// CommandLine returns what a check runs in the guest.
func (h Healthcheck) CommandLine() []string {
	if h.Shell {
		return append([]string{"/bin/sh", "-c"}, h.Command...)
	}
	return h.Command
}
