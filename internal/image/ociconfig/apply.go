package ociconfig

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

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

// maxPublished is how many ports are forwarded because an image exposes them.
const maxPublished = 128

// Apply fills in what a VM's configuration leaves to its image, by docker's rules. What of the
// image a VM's configuration can't have is left out: variables whose names are no
// [smolvm.IsVariableName], labels that are none of a VM's, a stop signal that there is not.
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
	config.Labels = withLabels(config.Labels, image.Labels)
	if _, err := ParseSignal(image.StopSignal); config.StopSignal == "" && err == nil {
		config.StopSignal = image.StopSignal
	}
	if config.PublishAll {
		config.PortForwards, err = publish(config.PortForwards, image.ExposedPorts)
	}
	return config, err
}

// ApplyInit resolves which init a VM has, and what is run beside it: nothing, as the image's own
// program is that init. Args are the kernel arguments of the image.
func ApplyInit(config smolvm.VMConfig, args string) smolvm.VMConfig {
	if config.Init == "" {
		return config
	}
	if config.Init == smolvm.InitAuto {
		config.Init = "/sbin/init"
		if line := config.CommandLine(); len(line) > 0 && strings.HasPrefix(line[0], "/") && !strings.ContainsAny(line[0], " \t\n") {
			config.Init = line[0]
		}
	}
	config.Entrypoint, config.Cmd = nil, nil
	if config.BootArgs == "" {
		config.BootArgs = args
	}
	config.BootArgs += " init=" + config.Init
	return config
}

// withLabels adds the image's labels to a VM's, as far as a VM can have them.
func withLabels(labels, image map[string]string) map[string]string {
	merged := maps.Clone(labels)
	for _, name := range slices.Sorted(maps.Keys(image)) {
		if _, own := labels[name]; own || len(merged) >= smolvm.MaxLabels || smolvm.ValidateLabel(name, image[name]) != nil {
			continue
		}
		if merged == nil {
			merged = map[string]string{}
		}
		merged[name] = image[name]
	}
	return merged
}

// publish adds forwards to the ports that an image exposes and that have none.
func publish(forwards []smolvm.PortForward, exposed []string) ([]smolvm.PortForward, error) {
	all := slices.Clone(forwards)
	for _, text := range exposed {
		number, protocol, _ := strings.Cut(text, "/")
		port, err := parsePort(number)
		if err != nil {
			return nil, fmt.Errorf("port %q of the image: %w", text, err)
		}
		forward := smolvm.PortForward{GuestPort: port, Protocol: smolvm.Protocol(protocol)}.WithDefaults()
		if forward.Protocol != smolvm.TCP && forward.Protocol != smolvm.UDP || slices.ContainsFunc(forwards, func(f smolvm.PortForward) bool {
			return f.GuestPort == port && f.WithDefaults().Protocol == forward.Protocol
		}) {
			continue
		}
		if all = append(all, forward); len(all)-len(forwards) > maxPublished {
			return nil, fmt.Errorf("the image exposes more than %d ports: forward those that you need", maxPublished)
		}
	}
	return all, nil
}

// Linux has real-time signals from firstRealTime on, as C libraries count them, to the last one.
const firstRealTime, lastSignal = 34, 64

// ParseSignal returns the number of a signal: SIGTERM, TERM, 15 or SIGRTMIN+3. It is zero for an
// empty text.
func ParseSignal(text string) (int, error) {
	if text == "" {
		return 0, nil
	}
	if number, err := strconv.Atoi(text); err == nil && number > 0 && number <= lastSignal {
		return number, nil
	}
	name := "SIG" + strings.TrimPrefix(strings.ToUpper(text), "SIG")
	if offset, found := strings.CutPrefix(name, "SIGRTMIN"); found {
		more, err := strconv.Atoi(strings.TrimPrefix(offset, "+"))
		if offset == "" {
			more, err = 0, nil
		}
		if err == nil && more >= 0 && firstRealTime+more <= lastSignal {
			return firstRealTime + more, nil
		}
	}
	if number := int(unix.SignalNum(name)); number > 0 {
		return number, nil
	}
	return 0, fmt.Errorf("%q is no signal; give a name or a number, as in SIGTERM", text)
}
