package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

// healthFlags are the flags that say how to find out whether what runs in a VM works.
type healthFlags struct {
	command string
	times   smolvm.Healthcheck
	none    bool
}

func (f *healthFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.command, "health-cmd", "", "check the VM's health by `LINE` of shell, run in it (default: the image's)")
	flags.DurationVar(&f.times.Interval, "health-interval", 0, "`DURATION` between checks of its health (default: the image's, else 30s)")
	flags.DurationVar(&f.times.Timeout, "health-timeout", 0, "`DURATION` that a check may take (default: the image's, else 30s)")
	flags.IntVar(&f.times.Retries, "health-retries", 0, "`N` failures in a row mean that the VM is unhealthy (default: the image's, else 3)")
	flags.DurationVar(&f.times.StartPeriod, "health-start-period", 0, "`DURATION` after the start in which failures don't count (default: the image's, else 0s)")
	flags.DurationVar(&f.times.StartInterval, "health-start-interval", 0, "`DURATION` between checks in that time (default: the image's, else 5s)")
	flags.BoolVar(&f.none, "no-healthcheck", false, "don't check the VM's health, whatever the image says")
	for _, name := range []string{"health-cmd", "health-interval", "health-timeout", "health-retries", "health-start-period", "health-start-interval"} {
		complete(cmd, name, words())
	}
}

// check returns the check that the flags ask for; nil: the image's.
func (f *healthFlags) check() (*smolvm.Healthcheck, error) {
	check := f.times
	for _, d := range []time.Duration{check.Interval, check.Timeout, check.StartPeriod, check.StartInterval} {
		if d < 0 {
			return nil, usagef("a time of the health check is negative: %s", d)
		}
	}
	if f.command != "" {
		check.Command, check.Shell = []string{f.command}, true
	}
	asked := f.command != "" || check.Interval != 0 || check.Timeout != 0 || check.Retries != 0 || check.StartPeriod != 0 || check.StartInterval != 0
	switch {
	case asked && f.none:
		return nil, usagef("--no-healthcheck excludes the other flags for health checks; give one or the other")
	case asked:
		return &check, nil
	}
	return nil, nil //nolint:nilnil // None is asked for.
}

// waitFor is what a start waits for when the VM is ready; empty: nothing.
type waitFor string

// waitHealthy waits until the VM is healthy.
const waitHealthy waitFor = "healthy"

func (w *waitFor) register(cmd *cobra.Command) {
	cmd.Flags().Func("wait", "wait until the VM is `healthy`, and fail if it becomes unhealthy or ends", func(text string) error {
		if *w = waitFor(text); *w != waitHealthy {
			return fmt.Errorf("%q is not known; use %s", text, waitHealthy)
		}
		return nil
	})
	complete(cmd, "wait", words(string(waitHealthy)))
}

// check returns an error if a VM can't come to what is waited for.
func (w waitFor) check(vm smolvm.VMInfo) error {
	if w == waitHealthy && vm.Config.Healthcheck == nil {
		return usagef("--wait healthy: VM %s has no health check; give --health-cmd when it is created, or an image with a HEALTHCHECK", vm.ID)
	}
	return nil
}

// await returns when the VM is as it is waited for.
func (w waitFor) await(ctx context.Context, m smolvm.Service, id string) error {
	if w == "" {
		return nil
	}
	_, err := m.WaitHealthy(ctx, id)
	return err
}

// startVM starts a VM and waits until it is as it is to be.
func startVM(ctx context.Context, m smolvm.Service, id string, options smolvm.StartOptions, wait waitFor) (smolvm.VMInfo, error) {
	if wait != "" {
		vm, err := m.Get(ctx, id)
		if err == nil {
			err = wait.check(vm)
		}
		if err != nil {
			return vm, err
		}
	}
	started, err := m.Start(ctx, id, options)
	if err == nil {
		err = wait.await(ctx, m, id)
	}
	return started, err
}

// errHealthKnown ends the waiting for health when the command has ended.
var errHealthKnown = errors.New("the command has ended")

// executeHealthy runs a command, which is what has to become healthy. If the VM becomes unhealthy
// before it was healthy, the command is ended, and the error says why.
func (a *app) executeHealthy(ctx context.Context, m smolvm.Service, id string, execute func(context.Context) error) error {
	both, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	waited := make(chan error, 1)
	go func() {
		_, err := m.WaitHealthy(both, id)
		switch {
		case err == nil:
			a.errorf("smolvm: VM %s is healthy", id)
		case both.Err() == nil:
			cancel(err)
		default:
			err = nil
		}
		waited <- err
	}()
	err := execute(both)
	cancel(errHealthKnown)
	if unhealthy := <-waited; unhealthy != nil {
		return unhealthy
	}
	return err
}
