package dockerfile

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	spec "github.com/moby/docker-image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/image/ociconfig"
)

// add plans an instruction.
func (p *planner) add(ctx context.Context, d *draft, command instructions.Command, line int) error {
	if err := p.expandCommand(d, command); err != nil {
		return err
	}
	step := Step{Line: line, Text: p.describe(d, command)}
	config := &d.stage.Config.Config
	var err error
	switch c := command.(type) {
	case *instructions.RunCommand:
		err = p.run(ctx, d, c, &step)
	case *instructions.CopyCommand:
		err = p.copy(ctx, d, c, &step)
	case *instructions.AddCommand:
		err = p.addFiles(d, c, &step)
	case *instructions.WorkdirCommand:
		workdir(d, c, &step)
	case *instructions.ArgCommand:
		err = p.arg(d, c, &step)
	case *instructions.EnvCommand:
		err = env(d, c, &step)
	case *instructions.OnbuildCommand:
		config.OnBuild = append(config.OnBuild, c.Expression)
		d.onBuild = append(d.onBuild, c.Expression)
		return nil // docker writes no history of it
	default:
		err = p.configure(d, command, &step)
	}
	if err != nil {
		return err
	}
	d.stage.Steps = append(d.stage.Steps, step)
	return nil
}

// expandCommand expands the variables of an instruction, but for those of ARG, whose values may
// not be needed.
func (p *planner) expandCommand(d *draft, command instructions.Command) error {
	expander := func(word string) (string, error) { return p.expand(word, d.env) }
	if one, ok := command.(instructions.SupportsSingleWordExpansion); ok {
		if _, isArg := command.(*instructions.ArgCommand); !isArg {
			if err := one.Expand(expander); err != nil {
				return err
			}
		}
	}
	raw, ok := command.(instructions.SupportsSingleWordExpansionRaw)
	if !ok {
		return nil
	}
	return raw.ExpandRaw(func(word string) (string, error) {
		lex := shell.NewLex('\\')
		lex.SkipProcessQuotes = true
		return expandBy(lex, word, d.env)
	})
}

// describe returns an instruction for people: as it is in the file, with variables expanded.
func (p *planner) describe(d *draft, command instructions.Command) string {
	text := command.Name()
	if code, ok := command.(fmt.Stringer); ok {
		text = code.String()
	}
	lex := shell.NewLex(p.escape)
	lex.RawQuotes, lex.RawEscapes, lex.SkipUnsetEnv = true, true, true
	if expanded, err := expandBy(lex, text, d.env); err == nil {
		text = expanded
	}
	word, rest, _ := strings.Cut(oneLine(text), " ")
	return strings.ToUpper(word) + " " + rest
}

// workdir sets the directory of what follows, and has it made.
func workdir(d *draft, c *instructions.WorkdirCommand, step *Step) {
	config := &d.stage.Config.Config
	dir := absolute(config.WorkingDir, c.Path)
	config.WorkingDir = dir
	step.History = "WORKDIR " + dir
	if dir != "/" {
		step.Op = &Mkdir{Path: dir, Owner: config.User}
	}
}

// absolute returns a path in the image, from the working directory on.
func absolute(dir, name string) string {
	if path.IsAbs(name) {
		return path.Clean(name)
	}
	return path.Join("/", dir, name)
}

// arg takes an argument of the build.
func (p *planner) arg(d *draft, c *instructions.ArgCommand, step *Step) error {
	var texts []string
	for _, one := range c.Args {
		name := one.Key
		value, has := p.opts.Args[name]
		p.used[name] = true
		if !has && one.Value != nil {
			has = true
			var err error
			if value, err = p.expand(*one.Value, d.env); err != nil {
				return err
			}
		} else if !has {
			value, has = lookup(p.args, name)
		}
		text := name
		if has {
			if len(name)+len(value) > maxVariable {
				return fmt.Errorf("the value of %.100q is longer than %d bytes", name, maxVariable)
			}
			text += "=" + value
			d.env = setEnv(d.env, name, value)
			d.values[name] = value
		}
		if _, known := d.values[name]; !known {
			d.values[name] = ""
		}
		d.args = append(d.args, name)
		texts = append(texts, text)
	}
	step.History = "ARG " + strings.Join(texts, " ")
	return nil
}

// env sets variables of the image.
func env(d *draft, c *instructions.EnvCommand, step *Step) error {
	step.History = "ENV"
	config := &d.stage.Config.Config
	for _, one := range c.Env {
		if len(one.Key)+len(one.Value) > maxVariable {
			return fmt.Errorf("the value of %.100q is longer than %d bytes", one.Key, maxVariable)
		}
		step.History += " " + one.String()
		d.env = setEnv(d.env, one.Key, one.Value)
		config.Env = setEnv(config.Env, one.Key, one.Value)
	}
	return nil
}

// configure plans an instruction that is about the configuration only.
func (p *planner) configure(d *draft, command instructions.Command, step *Step) error {
	config := &d.stage.Config.Config
	switch c := command.(type) {
	case *instructions.CmdCommand:
		config.Cmd = withShell(config.Shell, c.ShellDependantCmdLine)
		d.cmdSet = true
		step.History = fmt.Sprintf("CMD %q", config.Cmd)
	case *instructions.EntrypointCommand:
		config.Entrypoint = withShell(config.Shell, c.ShellDependantCmdLine)
		if !d.cmdSet { // the base's is not for this entrypoint
			config.Cmd = nil
		}
		step.History = fmt.Sprintf("ENTRYPOINT %q", config.Entrypoint)
	case *instructions.ShellCommand:
		config.Shell = c.Shell
		step.History = fmt.Sprintf("SHELL %v", c.Shell)
	case *instructions.UserCommand:
		if _, err := ociconfig.ParseUser(c.User); err != nil {
			return err
		}
		config.User = c.User
		step.History = "USER " + c.User
	case *instructions.LabelCommand:
		if config.Labels == nil {
			config.Labels = map[string]string{}
		}
		step.History = "LABEL"
		for _, one := range c.Labels {
			config.Labels[one.Key] = one.Value
			step.History += " " + one.String()
		}
	case *instructions.ExposeCommand:
		return p.expose(d, c, step)
	case *instructions.VolumeCommand:
		return volume(config, c, step)
	case *instructions.HealthCheckCommand:
		config.Healthcheck = c.Health
		step.History = fmt.Sprintf("HEALTHCHECK %+v", *c.Health)
	case *instructions.StopSignalCommand:
		if err := checkSignal(c.Signal); err != nil {
			return err
		}
		config.StopSignal = c.Signal
		step.History = "STOPSIGNAL " + c.Signal
	case *instructions.MaintainerCommand:
		d.stage.Config.Author = c.Maintainer
		step.History = "MAINTAINER " + c.Maintainer
	default:
		return refuse(strings.ToUpper(command.Name()), "smolvm does not know it")
	}
	return nil
}

// withShell returns a command, with the shell before it if it is a line for one.
func withShell(shell []string, line instructions.ShellDependantCmdLine) []string {
	if !line.PrependShell {
		return line.CmdLine
	}
	if len(shell) == 0 {
		shell = []string{"/bin/sh", "-c"}
	}
	return append(append([]string{}, shell...), strings.Join(line.CmdLine, " "))
}

func volume(config *spec.DockerOCIImageConfig, c *instructions.VolumeCommand, step *Step) error {
	if config.Volumes == nil {
		config.Volumes = map[string]struct{}{}
	}
	for _, one := range c.Volumes {
		if !path.IsAbs(one) {
			return fmt.Errorf("%q is no absolute path", one)
		}
		config.Volumes[one] = struct{}{}
	}
	step.History = fmt.Sprintf("VOLUME %v", c.Volumes)
	return nil
}

// maxPorts is how many ports an image may have.
const maxPorts = 4096

func (p *planner) expose(d *draft, c *instructions.ExposeCommand, step *Step) error {
	config := &d.stage.Config.Config
	if config.ExposedPorts == nil {
		config.ExposedPorts = map[string]struct{}{}
	}
	var ports []string
	for _, word := range c.Ports {
		words, err := p.expandWords(word, d.env)
		if err != nil {
			return err
		}
		for _, one := range words {
			if ports, err = appendPorts(ports, one); err != nil {
				return err
			}
		}
	}
	for _, port := range ports {
		config.ExposedPorts[port] = struct{}{}
	}
	if len(config.ExposedPorts) > maxPorts {
		return fmt.Errorf("the image has more than %d ports", maxPorts)
	}
	step.History = fmt.Sprintf("EXPOSE %v", ports)
	return nil
}

// appendPorts reads PORT[-PORT][/PROTOCOL]. What docker takes before a colon, and makes nothing
// of, is refused.
func appendPorts(ports []string, text string) ([]string, error) {
	numbers, protocol, _ := strings.Cut(text, "/")
	low, high, isRange := strings.Cut(numbers, "-")
	if protocol = strings.ToLower(protocol); protocol == "" {
		protocol = "tcp"
	}
	first, err := strconv.ParseUint(low, 10, 16)
	last := first
	if isRange && err == nil {
		last, err = strconv.ParseUint(high, 10, 16)
	}
	switch {
	case strings.Contains(text, ":"):
		return nil, fmt.Errorf("port %q: an image says only what its program listens on; publish it by `-p` when it is run", text)
	case err != nil, last < first, first == 0, protocol != "tcp" && protocol != "udp" && protocol != "sctp":
		return nil, fmt.Errorf("port %q: it is not NUMBER[-NUMBER][/tcp|udp|sctp]", text)
	case len(ports)+int(last-first) >= maxPorts:
		return nil, fmt.Errorf("port %q: there are more than %d", text, maxPorts)
	}
	for port := first; port <= last; port++ {
		ports = append(ports, fmt.Sprintf("%d/%s", port, protocol))
	}
	return ports, nil
}

// checkSignal checks the name or number of a signal.
func checkSignal(text string) error {
	if number, err := strconv.Atoi(text); err == nil {
		if number < 1 || number > 64 {
			return fmt.Errorf("there is no signal %s", text)
		}
		return nil
	}
	name := strings.TrimPrefix(strings.ToUpper(text), "SIG")
	base, offset, _ := strings.Cut(strings.ReplaceAll(name, "-", "+"), "+")
	if base == "RTMIN" || base == "RTMAX" {
		if n, err := strconv.Atoi(offset); offset == "" || err == nil && n >= 0 && n <= 30 {
			return nil
		}
	}
	if unix.SignalNum("SIG"+name) == 0 {
		return fmt.Errorf("there is no signal %q", text)
	}
	return nil
}

var errNoCommand = errors.New("there is no command")
