package ociconfig_test

import (
	"reflect"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociconfig"
)

func TestApplyHealth(t *testing.T) {
	image := &smolvm.ImageConfig{Healthcheck: &smolvm.Healthcheck{
		Command: []string{"/check", "-v"}, Interval: 7 * time.Second, Timeout: 2 * time.Second, StartPeriod: time.Minute, StartInterval: 3 * time.Second, Retries: 4,
	}}
	hasty := &smolvm.ImageConfig{Healthcheck: &smolvm.Healthcheck{Command: []string{"/check"}, Interval: 1, Timeout: 1, StartInterval: 1, Retries: 1}}
	defaults := smolvm.Healthcheck{Command: []string{"up"}, Shell: true, Interval: 30 * time.Second, Timeout: 30 * time.Second, StartInterval: 5 * time.Second, Retries: 3}
	for name, test := range map[string]struct {
		config smolvm.VMConfig
		image  *smolvm.ImageConfig
		want   *smolvm.Healthcheck
	}{
		"neither":        {smolvm.VMConfig{}, nil, nil},
		"image without":  {smolvm.VMConfig{}, &smolvm.ImageConfig{}, nil},
		"the image's":    {smolvm.VMConfig{}, image, image.Healthcheck},
		"none is wanted": {smolvm.VMConfig{NoHealthcheck: true}, image, nil},
		"one's own":      {smolvm.VMConfig{Healthcheck: &smolvm.Healthcheck{Command: []string{"up"}, Shell: true}}, nil, &defaults},
		"another command": {smolvm.VMConfig{Healthcheck: &smolvm.Healthcheck{Command: []string{"up"}, Shell: true}}, image, &smolvm.Healthcheck{
			Command: []string{"up"}, Shell: true, Interval: 7 * time.Second, Timeout: 2 * time.Second, StartPeriod: time.Minute, StartInterval: 3 * time.Second, Retries: 4,
		}},
		"other times": {smolvm.VMConfig{Healthcheck: &smolvm.Healthcheck{Interval: time.Millisecond, Retries: 9}}, image, &smolvm.Healthcheck{
			Command: []string{"/check", "-v"}, Interval: time.Millisecond, Timeout: 2 * time.Second, StartPeriod: time.Minute, StartInterval: 3 * time.Second, Retries: 9,
		}},
		"an image in haste": {smolvm.VMConfig{}, hasty, &smolvm.Healthcheck{Command: []string{"/check"}, Interval: time.Second, Timeout: 1, StartInterval: time.Second, Retries: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ociconfig.ApplyHealth(test.config, test.image)
			if err != nil || !reflect.DeepEqual(got.Healthcheck, test.want) {
				t.Errorf("the check is %+v (%v), want %+v", got.Healthcheck, err, test.want)
			}
		})
	}
	if _, err := ociconfig.ApplyHealth(smolvm.VMConfig{Healthcheck: &smolvm.Healthcheck{Retries: 2}}, &smolvm.ImageConfig{}); err == nil {
		t.Error("a check without a command is taken")
	}
}
