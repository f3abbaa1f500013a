// Package ociconfig reads what the configuration of an OCI image says of the program in it, and
// says what is run when flags override some of it, by docker's rules. It does no I/O.
package ociconfig

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// DefaultPath is the PATH of a program whose image sets none, as in docker.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Config is what an image says of its program. The zero value is of an image that says nothing.
type Config struct {
	// Entrypoint and Cmd are what is run, one after the other.
	Entrypoint, Cmd []string
	// Env are variables, as NAME=VALUE, each name once.
	Env []string
	// WorkingDir is the directory that it is run in. Empty: /.
	WorkingDir string
	// User is who runs it. The zero value is root.
	User User
	// Ports are what it listens on, in order.
	Ports []Port
	// StopSignal is the name or number of the signal that ends it. Empty: SIGTERM.
	StopSignal string
	// Labels are for people.
	Labels map[string]string
	// Volumes are the directories in which it keeps data that outlive it, in order.
	Volumes []string
	// Healthcheck is how to find out that it works; nil if the image does not say.
	Healthcheck *Healthcheck
}

// User is a user and a group of a guest, each by name or number.
type User struct {
	// Name is the user. Empty: root.
	Name string
	// Group is the group. Empty: the user's own; then the groups that the guest's files have
	// the user in are the program's too.
	Group string
}

// String returns the user as an image has it: USER or USER:GROUP.
func (u User) String() string {
	if u.Group == "" {
		return u.Name
	}
	return u.Name + ":" + u.Group
}

// Port is a port that a program listens on.
type Port struct {
	Number   int
	Protocol string // tcp, udp or sctp
}

// String returns the port as docker writes it: 80/tcp.
func (p Port) String() string { return fmt.Sprintf("%d/%s", p.Number, p.Protocol) }

// Healthcheck is how to find out that a program works.
type Healthcheck struct {
	// Command is what is run; its success is health.
	Command []string
	// Shell reports whether Command is one line for the shell.
	Shell bool
	// Interval is the time between checks, and Timeout how long one may take.
	Interval, Timeout time.Duration
	// StartPeriod is the time in which a failure does not count, and StartInterval the time
	// between checks in it.
	StartPeriod, StartInterval time.Duration
	// Retries is how many failures in a row mean that it does not work.
	Retries int
}

// What docker takes where an image does not say.
const (
	defaultInterval      = 30 * time.Second
	defaultTimeout       = 30 * time.Second
	defaultStartInterval = 5 * time.Second
	defaultRetries       = 3
)

// Bounds of a configuration: of the length of a list, and of the whole of its texts, in bytes,
// which is a quarter of what a kernel takes as arguments and environment of a program.
const (
	maxList = 4096
	maxText = 512 << 10
)

// Parse reads the document of an image's configuration.
func Parse(document []byte) (Config, error) {
	file, err := v1.ParseConfigFile(bytes.NewReader(document))
	if err != nil {
		return Config{}, fmt.Errorf("read configuration of image: %w", err)
	}
	config, err := parse(file.Config)
	if err != nil {
		return Config{}, fmt.Errorf("configuration of image: %w", err)
	}
	return config, nil
}

func parse(from v1.Config) (Config, error) {
	config := Config{Entrypoint: from.Entrypoint, Cmd: from.Cmd, WorkingDir: from.WorkingDir, StopSignal: from.StopSignal, Labels: from.Labels}
	for name, list := range map[string][]string{"Entrypoint": from.Entrypoint, "Cmd": from.Cmd, "Env": from.Env, "WorkingDir": {from.WorkingDir}, "User": {from.User}} {
		if err := checkTexts(list); err != nil {
			return Config{}, fmt.Errorf("%s: %w", name, err)
		}
	}
	if len(from.ExposedPorts) > maxList || len(from.Volumes) > maxList {
		return Config{}, fmt.Errorf("it has more than %d ports or volumes", maxList)
	}
	config.Env = mergeEnv(from.Env, nil)
	var err error
	if config.User, err = ParseUser(from.User); err != nil {
		return Config{}, err
	}
	if config.Ports, err = parsePorts(from.ExposedPorts); err != nil {
		return Config{}, err
	}
	for volume := range from.Volumes {
		if !strings.HasPrefix(volume, "/") || strings.Contains(volume, "\x00") {
			return Config{}, fmt.Errorf("volume %q: it is no absolute path", volume)
		}
		config.Volumes = append(config.Volumes, volume)
	}
	slices.Sort(config.Volumes)
	config.Healthcheck, err = parseHealthcheck(from.Healthcheck)
	return config, err
}

// checkTexts checks texts that go to a kernel.
func checkTexts(list []string) error {
	total := 0
	for _, text := range list {
		if strings.Contains(text, "\x00") {
			return errors.New("there is a NUL in it")
		}
		total += len(text) + 1
	}
	if len(list) > maxList || total > maxText {
		return fmt.Errorf("%d texts with %d bytes are too many", len(list), total)
	}
	return nil
}

// ParseUser reads USER, USER:GROUP, UID, UID:GID or :GROUP.
func ParseUser(text string) (User, error) {
	name, group, found := strings.Cut(text, ":")
	if strings.Contains(group, ":") || found && group == "" && name == "" || strings.ContainsAny(text, "\x00\n/") {
		return User{}, fmt.Errorf("user %q: give USER or USER:GROUP, by names or numbers", text)
	}
	for _, part := range []string{name, group} {
		if number, err := strconv.ParseInt(part, 10, 64); err == nil && (number < 0 || number > 1<<31-1) || errors.Is(err, strconv.ErrRange) {
			return User{}, fmt.Errorf("user %q: the number %s is no id", text, part)
		}
	}
	return User{Name: name, Group: group}, nil
}

// parsePorts reads ports such as 80, 80/tcp and 8000-8010/udp.
func parsePorts(from map[string]struct{}) ([]Port, error) {
	var ports []Port
	for text := range from {
		numbers, protocol, _ := strings.Cut(text, "/")
		protocol = strings.ToLower(cmp.Or(protocol, "tcp"))
		low, high, isRange := strings.Cut(numbers, "-")
		first, err := parsePort(low)
		last := first
		if isRange && err == nil {
			last, err = parsePort(high)
		}
		if err != nil || last < first || !slices.Contains([]string{"tcp", "udp", "sctp"}, protocol) {
			return nil, fmt.Errorf("port %q: it is not NUMBER[-NUMBER][/tcp|udp|sctp]", text)
		}
		for number := first; number <= last; number++ {
			ports = append(ports, Port{number, protocol})
		}
	}
	slices.SortFunc(ports, func(a, b Port) int {
		return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.Protocol, b.Protocol))
	})
	return slices.Compact(ports), nil
}

func parsePort(text string) (int, error) {
	number, err := strconv.ParseUint(text, 10, 16)
	if err == nil && number == 0 {
		err = strconv.ErrRange
	}
	return int(number), err
}

// parseHealthcheck reads a check. One that is NONE is none.
func parseHealthcheck(from *v1.HealthConfig) (*Healthcheck, error) {
	if from == nil || len(from.Test) == 0 || from.Test[0] == "NONE" {
		return nil, nil
	}
	if err := checkTexts(from.Test); err != nil {
		return nil, fmt.Errorf("Healthcheck: %w", err)
	}
	check := Healthcheck{
		Command: from.Test[1:], Shell: from.Test[0] == "CMD-SHELL",
		Interval: cmp.Or(from.Interval, defaultInterval), Timeout: cmp.Or(from.Timeout, defaultTimeout),
		StartPeriod: from.StartPeriod, StartInterval: defaultStartInterval, Retries: cmp.Or(from.Retries, defaultRetries),
	}
	switch {
	case !check.Shell && from.Test[0] != "CMD":
		return nil, fmt.Errorf("Healthcheck: %q is none of CMD, CMD-SHELL and NONE", from.Test[0])
	case len(check.Command) == 0, check.Shell && len(check.Command) > 1:
		return nil, errors.New("Healthcheck: it has no command, or more than a shell takes")
	case check.Interval < 0, check.Timeout < 0, check.StartPeriod < 0, check.Retries < 0:
		return nil, errors.New("Healthcheck: a time or number is below zero")
	}
	return &check, nil
}

// Flags are what a person says in place of what an image does. Zero values leave the image's.
type Flags struct {
	// Args are the arguments behind the image: they replace Cmd.
	Args []string
	// Entrypoint replaces Entrypoint if it is not nil, and resets Cmd. An empty one, as of
	// `--entrypoint ""`, resets it.
	Entrypoint []string
	// Env are NAME=VALUE, which replace the image's of the same name; a NAME alone takes the
	// variable away.
	Env []string
	// WorkingDir replaces WorkingDir.
	WorkingDir string
	// User replaces User: USER[:GROUP].
	User string
	// StopSignal replaces StopSignal.
	StopSignal string
	// Labels are added, and replace those of the same name.
	Labels map[string]string
	// NoHealthcheck leaves the check out.
	NoHealthcheck bool
}

// ErrNoCommand reports that neither the image nor the flags say what to run.
var ErrNoCommand = errors.New("no command is given, and the image has none")

// With returns a configuration with what flags override, by docker's rules. Its PATH is set.
func (c Config) With(flags Flags) (Config, error) {
	if flags.Entrypoint != nil {
		c.Entrypoint, c.Cmd = flags.Entrypoint, nil
		if len(flags.Entrypoint) == 1 && flags.Entrypoint[0] == "" {
			c.Entrypoint = nil
		}
	}
	if len(flags.Args) > 0 {
		c.Cmd = flags.Args
	}
	for _, list := range [][]string{flags.Args, flags.Entrypoint, flags.Env, {flags.WorkingDir}} {
		if err := checkTexts(list); err != nil {
			return Config{}, err
		}
	}
	c.Env = mergeEnv(c.Env, flags.Env)
	if !slices.ContainsFunc(c.Env, func(text string) bool { return strings.HasPrefix(text, "PATH=") }) && !slices.Contains(flags.Env, "PATH") {
		c.Env = append([]string{"PATH=" + DefaultPath}, c.Env...)
	}
	if flags.WorkingDir != "" {
		if !strings.HasPrefix(flags.WorkingDir, "/") {
			return Config{}, fmt.Errorf("working directory %q: it is no absolute path", flags.WorkingDir)
		}
		c.WorkingDir = flags.WorkingDir
	}
	if flags.User != "" {
		var err error
		if c.User, err = ParseUser(flags.User); err != nil {
			return Config{}, err
		}
	}
	c.StopSignal = cmp.Or(flags.StopSignal, c.StopSignal)
	if len(flags.Labels) > 0 {
		merged := maps.Clone(c.Labels)
		if merged == nil {
			merged = map[string]string{}
		}
		maps.Copy(merged, flags.Labels)
		c.Labels = merged
	}
	if flags.NoHealthcheck {
		c.Healthcheck = nil
	}
	return c, nil
}

// Command returns what is run: the entrypoint with the command behind it. The error matches
// [ErrNoCommand] if there is none.
func (c Config) Command() ([]string, error) {
	command := slices.Concat(c.Entrypoint, c.Cmd)
	if len(command) == 0 || command[0] == "" {
		return nil, ErrNoCommand
	}
	return command, nil
}

// Dir returns the directory that the program is run in.
func (c Config) Dir() string {
	if !strings.HasPrefix(c.WorkingDir, "/") { // docker takes it as below /
		return "/" + c.WorkingDir
	}
	return c.WorkingDir
}

// mergeEnv puts variables over others: the place of a name stays that of the first, its value is
// the last. A name of more alone takes the variable away. What has no name is left out.
func mergeEnv(env, more []string) []string {
	var merged []string
	at := map[string]int{}
	gone := map[int]bool{}
	for i, text := range slices.Concat(env, more) {
		name, _, found := strings.Cut(text, "=")
		if name == "" || !found && i < len(env) {
			continue
		}
		place, known := at[name]
		switch {
		case !found && known:
			gone[place] = true
			delete(at, name)
		case !found:
		case known:
			merged[place] = text
		default:
			at[name] = len(merged)
			merged = append(merged, text)
		}
	}
	var left []string
	for i, text := range merged {
		if !gone[i] {
			left = append(left, text)
		}
	}
	return left
}
