package ociconfig

import (
	"maps"
	"slices"
	"strings"

	"github.com/smolvm/smolvm"
)

// Public returns the configuration as the public type has it.
func (c Config) Public() smolvm.ImageConfig {
	public := smolvm.ImageConfig{
		Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, WorkingDir: c.WorkingDir, User: c.User.String(),
		StopSignal: c.StopSignal, Labels: c.Labels, Volumes: c.Volumes,
	}
	for _, port := range c.Ports {
		public.ExposedPorts = append(public.ExposedPorts, port.String())
	}
	if h := c.Healthcheck; h != nil {
		check := smolvm.Healthcheck(*h)
		public.Healthcheck = &check
	}
	return public
}

// Apply fills in what a VM's configuration leaves to its image, by docker's rules. Variables of
// the image whose names a VM's configuration can't have are left out; see
// [smolvm.IsVariableName].
func Apply(config smolvm.VMConfig, image smolvm.ImageConfig) (smolvm.VMConfig, error) {
	user, err := ParseUser(image.User)
	if err != nil {
		return config, err
	}
	flags := Flags{Args: config.Cmd, Entrypoint: config.Entrypoint, WorkingDir: config.WorkingDir, User: config.User}
	for _, name := range slices.Sorted(maps.Keys(config.Env)) {
		flags.Env = append(flags.Env, name+"="+config.Env[name])
	}
	own := Config{Entrypoint: image.Entrypoint, Cmd: image.Cmd, Env: image.Env, WorkingDir: image.WorkingDir, User: user}
	merged, err := own.With(flags)
	if err != nil {
		return config, err
	}
	config.Entrypoint, config.Cmd = slices.Clone(merged.Entrypoint), slices.Clone(merged.Cmd)
	config.WorkingDir, config.User = merged.Dir(), merged.User.String()
	config.Env = map[string]string{}
	for _, text := range merged.Env {
		if name, value, _ := strings.Cut(text, "="); smolvm.IsVariableName(name) {
			config.Env[name] = value
		}
	}
	return config, nil
}
