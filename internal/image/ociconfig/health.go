package ociconfig

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/smolvm/smolvm"
)

// minImageInterval is the least time between checks that an image gets by itself: a check costs the
// host something too, and whoever made the image need not care.
const minImageInterval = time.Second

// errNoCheck reports that a check has times, and nothing to run.
var errNoCheck = errors.New("health check: neither the image nor the flags say what to run")

// ApplyHealth fills in what a VM's configuration leaves to its image of the checks of its health,
// and to defaults. Image is nil if it has no configuration.
func ApplyHealth(config smolvm.VMConfig, image *smolvm.ImageConfig) (smolvm.VMConfig, error) {
	var base, own smolvm.Healthcheck
	if image != nil && image.Healthcheck != nil {
		base = *image.Healthcheck
		base.Interval = max(base.Interval, minImageInterval)
		base.StartInterval = max(base.StartInterval, minImageInterval)
	}
	switch {
	case config.NoHealthcheck:
		return config, nil
	case config.Healthcheck != nil:
		own = *config.Healthcheck
	case image == nil || image.Healthcheck == nil:
		return config, nil
	}
	if len(own.Command) == 0 {
		own.Command, own.Shell = slices.Clone(base.Command), base.Shell
	}
	if len(own.Command) == 0 {
		return config, errNoCheck
	}
	own.Interval = cmp.Or(own.Interval, base.Interval, defaultInterval)
	own.Timeout = cmp.Or(own.Timeout, base.Timeout, defaultTimeout)
	own.StartPeriod = cmp.Or(own.StartPeriod, base.StartPeriod)
	own.StartInterval = cmp.Or(own.StartInterval, base.StartInterval, defaultStartInterval)
	own.Retries = cmp.Or(own.Retries, base.Retries, defaultRetries)
	config.Healthcheck = &own
	return config, nil
}
