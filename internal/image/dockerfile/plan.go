package dockerfile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"

	"github.com/smolvm/smolvm/internal/image/ociconfig"
)

// Bounds of a Dockerfile.
const (
	// MaxSize is how long a Dockerfile may be, in bytes.
	MaxSize = 1 << 20
	// maxStages and maxCommands are how many stages and instructions it may have, with those
	// that its bases have for it.
	maxStages, maxCommands = 500, 5000
)

// planner makes a plan.
type planner struct {
	opts   Options
	escape rune
	stages []instructions.Stage
	// args are the arguments of the whole file: those of platforms, and those before FROM.
	args []string
	// bases are what stages are based on, by their numbers.
	bases map[int]Source
	// drafts are the stages that are begun, by their numbers.
	drafts map[int]*draft
	// used are the arguments of the build that the file knows.
	used map[string]bool
	plan Plan
}

// draft is a stage that is being planned.
type draft struct {
	number int
	stage  *Stage
	// onBuild are the instructions that it has for those that are based on it.
	onBuild []string
	// env are the variables as its instructions see them: the image's, and arguments.
	env []string
	// args are the names of its arguments, in order, and values those that they had.
	args   []string
	values map[string]string
	cmdSet bool
	done   bool
}

// New reads a Dockerfile. Errors that are about it are of type [*Error].
func New(ctx context.Context, text []byte, opts Options) (*Plan, error) {
	p := &planner{opts: opts, bases: map[int]Source{}, drafts: map[int]*draft{}, used: map[string]bool{}}
	if err := p.parse(text); err != nil {
		return nil, err
	}
	target, err := p.target()
	if err != nil {
		return nil, p.errorAt(0, err)
	}
	if err := p.resolveBases(); err != nil {
		return nil, err
	}
	if _, err := p.need(ctx, target); err != nil {
		return nil, err
	}
	p.finish()
	return &p.plan, nil
}

// errorAt says where something is wrong.
func (p *planner) errorAt(line int, err error) error {
	var at *Error
	if err == nil || errors.As(err, &at) {
		return err
	}
	return &Error{File: p.opts.Name, Line: line, Err: err}
}

// explain says where the parser found something wrong.
func (p *planner) explain(err error) error {
	line := 0
	if at := (*parser.LocationError)(nil); errors.As(err, &at) {
		line, err = firstLine(slices.Concat(at.Locations...)), at.Unwrap()
	}
	return p.errorAt(line, err)
}

func firstLine(ranges []parser.Range) int {
	if len(ranges) == 0 {
		return 0
	}
	return ranges[0].Start.Line
}

// parse reads the syntax.
func (p *planner) parse(text []byte) error {
	if len(text) > MaxSize {
		return p.errorAt(0, fmt.Errorf("it has %d bytes, more than %d", len(text), MaxSize))
	}
	if syntax, _, at, ok := parser.DetectSyntax(text); ok && !isDockers(syntax) {
		return p.errorAt(firstLine(at), refuse("syntax "+strconv.Quote(syntax), "smolvm reads docker/dockerfile itself, and fetches no other frontend"))
	}
	parsed, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return p.explain(err)
	}
	for _, warning := range parsed.Warnings {
		p.plan.Warnings = append(p.plan.Warnings, Warning{Line: warning.Location.Start.Line, Text: oneLine(warning.Short)})
	}
	p.escape = parsed.EscapeToken
	first := slices.IndexFunc(parsed.AST.Children, func(n *parser.Node) bool { return strings.EqualFold(n.Value, "from") })
	for i, node := range parsed.AST.Children {
		if (first < 0 || i < first) && !strings.EqualFold(node.Value, "arg") {
			return p.errorAt(node.StartLine, fmt.Errorf("%s comes before the first FROM, where only ARG may be", strings.ToUpper(node.Value)))
		}
	}
	stages, args, err := instructions.Parse(parsed.AST, nil)
	if err != nil {
		return p.explain(err)
	}
	commands := len(args)
	for _, stage := range stages {
		commands += len(stage.Commands)
	}
	switch {
	case len(stages) == 0:
		return p.errorAt(0, errors.New("there is no FROM, so no stage to build"))
	case len(stages) > maxStages, commands > maxCommands:
		return p.errorAt(0, fmt.Errorf("it has %d stages and %d instructions, more than %d and %d", len(stages), commands, maxStages, maxCommands))
	}
	p.stages = stages
	if err := p.checkNames(); err != nil {
		return err
	}
	return p.globalArgs(args)
}

// isDockers reports whether a syntax is the one that docker's own frontend has.
func isDockers(syntax string) bool {
	name, _, _ := strings.Cut(strings.TrimPrefix(syntax, "docker.io/"), ":")
	name, _, _ = strings.Cut(name, "@")
	return name == "docker/dockerfile" || name == "docker/dockerfile-upstream"
}

// checkNames checks that no two stages have one name.
func (p *planner) checkNames() error {
	lines := map[string]int{}
	for _, stage := range p.stages {
		line := firstLine(stage.Location)
		switch before, taken := lines[stage.Name]; {
		case stage.Name == "":
		case stage.Name == "scratch" || stage.Name == "context":
			return p.errorAt(line, fmt.Errorf("a stage can't have the name %q, which means something else", stage.Name))
		case taken:
			return p.errorAt(line, fmt.Errorf("there are two stages of the name %q: the other one is in line %d", stage.Name, before))
		}
		lines[stage.Name] = line
	}
	return nil
}

// globalArgs takes the arguments that are before the first FROM.
func (p *planner) globalArgs(commands []instructions.ArgCommand) error {
	platform := "linux/" + p.opts.Arch
	target := p.opts.Target
	if target == "" {
		target = "default"
	}
	for _, one := range [][2]string{
		{"BUILDPLATFORM", platform}, {"BUILDOS", "linux"}, {"BUILDOSVERSION", ""}, {"BUILDARCH", p.opts.Arch}, {"BUILDVARIANT", ""},
		{"TARGETPLATFORM", platform}, {"TARGETOS", "linux"}, {"TARGETOSVERSION", ""}, {"TARGETARCH", p.opts.Arch}, {"TARGETVARIANT", ""},
		{"TARGETSTAGE", target},
	} {
		p.args = setEnv(p.args, one[0], one[1])
		p.used[one[0]] = true
	}
	for _, command := range commands {
		for _, arg := range command.Args {
			value, given := p.opts.Args[arg.Key]
			p.used[arg.Key] = true
			switch {
			case given:
			case arg.Value == nil:
				continue
			default:
				var err error
				if value, err = p.expand(*arg.Value, p.args); err != nil {
					return p.errorAt(firstLine(command.Location()), fmt.Errorf("ARG %s: %w", arg.Key, err))
				}
			}
			p.args = setEnv(p.args, arg.Key, value)
		}
	}
	return nil
}

// target returns the number of the stage that is wanted.
func (p *planner) target() (int, error) {
	if p.opts.Target == "" {
		return len(p.stages) - 1, nil
	}
	if number, ok := p.find(p.opts.Target); ok {
		return number, nil
	}
	var names []string
	for i, stage := range p.stages {
		names = append(names, stageName(stage.Name, i))
	}
	return 0, fmt.Errorf("there is no stage %q to build; there are: %s", p.opts.Target, strings.Join(names, ", "))
}

// find finds a stage by its name or number.
func (p *planner) find(text string) (int, bool) {
	if number, err := strconv.Atoi(text); err == nil {
		return number, number >= 0 && number < len(p.stages)
	}
	return instructions.HasStage(p.stages, text)
}

// resolveBases finds out what stages are based on, those that are not needed too, as the names
// in them decide what others mean.
func (p *planner) resolveBases() error {
	for i, stage := range p.stages {
		line := firstLine(stage.Location)
		name, err := p.expand(stage.BaseName, p.args)
		switch {
		case err != nil:
			return p.errorAt(line, fmt.Errorf("FROM %s: %w", stage.BaseName, err))
		case name == "":
			return p.errorAt(line, fmt.Errorf("FROM %s: the name of the base is empty; an argument in it needs a default, in an ARG before the first FROM", stage.BaseName))
		}
		if err := p.checkPlatform(stage.Platform); err != nil {
			return p.errorAt(line, err)
		}
		before, isStage := instructions.HasStage(p.stages[:i], name)
		switch {
		case name == "scratch":
			p.bases[i] = Source{Scratch: true}
		case isStage:
			p.bases[i] = Source{Stage: p.draft(before).stage}
		default:
			p.bases[i] = Source{Image: name}
		}
	}
	return nil
}

// checkPlatform checks that a stage is for this host's guests.
func (p *planner) checkPlatform(text string) error {
	if text == "" {
		return nil
	}
	platform, err := p.expand(text, p.args)
	if err != nil {
		return fmt.Errorf("FROM --platform=%s: %w", text, err)
	}
	return fits(platform, p.opts.Arch)
}

// fits checks that a platform, such as linux/arm64, is the one of guests.
func fits(platform, arch string) error {
	parts := strings.Split(strings.ToLower(platform), "/")
	if len(parts) == 1 && parts[0] != "linux" {
		parts = []string{"linux", parts[0]}
	}
	names := map[string]string{"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64"}
	if len(parts) > 1 && names[parts[1]] != "" {
		parts[1] = names[parts[1]]
	}
	switch {
	case platform == "" || len(parts) > 3:
		return fmt.Errorf("FROM --platform=%s: give OS/ARCHITECTURE, such as linux/%s", platform, arch)
	case parts[0] != "linux", len(parts) > 1 && parts[1] != arch:
		return refuse("FROM --platform="+platform, fmt.Sprintf("guests run programs of this host's architecture only, linux/%s", arch))
	}
	return nil
}

// draft returns a stage by its number, which has no steps yet when it is asked for first.
func (p *planner) draft(number int) *draft {
	d := p.drafts[number]
	if d == nil {
		from := p.stages[number]
		d = &draft{number: number, stage: &Stage{Name: stageName(from.Name, number), Line: firstLine(from.Location)}, values: map[string]string{}}
		p.drafts[number] = d
	}
	return d
}

// need plans a stage, and before it those that it needs.
func (p *planner) need(ctx context.Context, number int) (*draft, error) {
	d := p.draft(number)
	if d.done {
		return d, nil
	}
	d.done = true // a stage needs only those before it
	d.stage.Base = p.bases[number]
	triggers, err := p.inherit(ctx, d)
	if err != nil {
		return nil, err
	}
	commands, err := p.parseTriggers(triggers)
	if err != nil {
		return nil, p.errorAt(d.stage.Line, err)
	}
	onBuild := len(commands)
	commands = append(commands, p.stages[number].Commands...)
	if len(commands) > maxCommands {
		return nil, p.errorAt(d.stage.Line, fmt.Errorf("the stage has more than %d instructions", maxCommands))
	}
	for i, command := range commands {
		line := firstLine(command.Location())
		if i < onBuild {
			line = d.stage.Line
		}
		if err := p.add(ctx, d, command, line); err != nil {
			return nil, p.errorAt(line, fmt.Errorf("%s: %w", strings.ToUpper(command.Name()), err))
		}
	}
	p.plan.Stages = append(p.plan.Stages, d.stage)
	return d, nil
}

// inherit has a stage begin as what it is based on. It returns the instructions that this has for
// it.
func (p *planner) inherit(ctx context.Context, d *draft) (triggers []string, err error) {
	switch base := d.stage.Base; {
	case base.Scratch:
		d.stage.Config = emptyConfig(p.opts.Arch)
	case base.Stage != nil:
		before, err := p.need(ctx, p.number(base.Stage))
		if err != nil {
			return nil, err
		}
		if d.stage.Config, err = clone(before.stage.Config); err != nil {
			return nil, err
		}
		d.stage.Config.History = nil
		d.env, d.args, d.values = slices.Clone(before.env), slices.Clone(before.args), maps.Clone(before.values)
		triggers = before.onBuild
	default:
		config, err := p.opts.Base(ctx, base.Image)
		if err == nil {
			d.stage.Config, err = clone(config)
		}
		if err != nil {
			return nil, p.errorAt(d.stage.Line, fmt.Errorf("FROM %s: %w", base.Image, err))
		}
		triggers = d.stage.Config.Config.OnBuild
	}
	config := &d.stage.Config
	config.Config.OnBuild, config.Created = nil, nil
	if _, ok := lookup(config.Config.Env, "PATH"); !ok {
		config.Config.Env = append(config.Config.Env, "PATH="+ociconfig.DefaultPath)
	}
	if base := d.stage.Base; base.Stage == nil {
		for _, one := range config.Config.Env {
			name, value, _ := strings.Cut(one, "=")
			d.env = setEnv(d.env, name, value)
		}
	}
	return triggers, nil
}

// number returns the number of a stage.
func (p *planner) number(stage *Stage) int {
	for number, d := range p.drafts {
		if d.stage == stage {
			return number
		}
	}
	return -1 // never: all stages have drafts
}

// parseTriggers reads instructions that an image has for those that are based on it.
func (p *planner) parseTriggers(triggers []string) ([]instructions.Command, error) {
	var commands []instructions.Command
	if len(triggers) > maxCommands {
		return nil, fmt.Errorf("the base has %d instructions by ONBUILD, more than %d", len(triggers), maxCommands)
	}
	for _, trigger := range triggers {
		fail := func(err error) error {
			if at := (*parser.LocationError)(nil); errors.As(err, &at) {
				err = at.Unwrap()
			}
			return fmt.Errorf("the base has ONBUILD %.200q: %w", trigger, err)
		}
		if len(trigger) > MaxSize {
			return nil, fail(errors.New("it is too long"))
		}
		parsed, err := parser.Parse(strings.NewReader(trigger))
		if err != nil {
			return nil, fail(err)
		}
		if len(parsed.AST.Children) != 1 {
			return nil, fail(errors.New("it is not one instruction"))
		}
		command, err := instructions.ParseCommand(parsed.AST.Children[0])
		if err != nil {
			return nil, fail(err)
		}
		commands = append(commands, command)
	}
	return commands, nil
}

// clone returns a copy of a configuration that shares nothing with it.
func clone(config Config) (Config, error) {
	text, err := json.Marshal(config)
	if err != nil {
		return Config{}, err
	}
	var copied Config
	err = json.Unmarshal(text, &copied)
	return copied, err
}

// finish adds what is about the whole.
func (p *planner) finish() {
	config := &p.plan.Target().Config.Config
	if len(p.opts.Labels) > 0 && config.Labels == nil {
		config.Labels = map[string]string{}
	}
	maps.Copy(config.Labels, p.opts.Labels)
	// An argument of a stage that is not needed is known too.
	for _, stage := range p.stages {
		for _, command := range stage.Commands {
			if arg, ok := command.(*instructions.ArgCommand); ok {
				for _, one := range arg.Args {
					p.used[one.Key] = true
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.opts.Args)) {
		if !p.used[name] && !isProxy(name) && name != epochArg {
			p.plan.Warnings = append(p.plan.Warnings, Warning{Text: fmt.Sprintf("no ARG takes the --build-arg %s", name)})
		}
	}
}
