package dockerfile

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// scriptDir is where a script of a heredoc is, as in BuildKit.
const scriptDir = "/dev/pipes"

// run plans a command that is run.
func (p *planner) run(ctx context.Context, d *draft, c *instructions.RunCommand, step *Step) error {
	switch network := instructions.GetNetwork(c); {
	case slices.Contains(c.FlagsUsed, "security") && instructions.GetSecurity(c) != instructions.SecuritySandbox:
		return refuse("--security="+instructions.GetSecurity(c), "a command is root in a VM of its own already, with all that its kernel allows")
	case slices.Contains(c.FlagsUsed, "device"):
		return refuse("--device", "a guest has no device of the host")
	case network != instructions.NetworkDefault && network != instructions.NetworkNone:
		return refuse("--network="+network, "a guest has a network of its own: default or none")
	}
	config := &d.stage.Config.Config
	run := &Run{Dir: absolute("/", config.WorkingDir), User: config.User, NoNetwork: instructions.GetNetwork(c) == instructions.NetworkNone}
	line, script, err := inline(c.ShellDependantCmdLine)
	if err != nil {
		return err
	}
	if script != nil {
		run.Mounts = append(run.Mounts, *script)
	}
	run.Args = withShell(config.Shell, line)
	if len(run.Args) == 0 || len(line.CmdLine) == 0 || line.PrependShell && strings.TrimSpace(line.CmdLine[0]) == "" {
		return errNoCommand
	}
	for _, m := range instructions.GetMounts(c) {
		mount, err := p.mount(ctx, d, m)
		if err != nil {
			return fmt.Errorf("--mount=type=%s: %w", m.Type, err)
		}
		run.Mounts = append(run.Mounts, mount)
	}
	run.Env = slices.Clone(d.env)
	for _, name := range sortedKeys(p.opts.Args) {
		if _, set := lookup(run.Env, name); isProxy(name) && !set {
			run.Proxy = append(run.Proxy, name+"="+p.opts.Args[name])
		}
	}
	step.Op = run
	step.History = "RUN " + historyOf(run.Args, d) + " # buildkit"
	return nil
}

// inline returns a command with what its heredocs hold. A script that names its interpreter is
// mounted, and run as a program; its command line has no shell.
func inline(line instructions.ShellDependantCmdLine) (instructions.ShellDependantCmdLine, *Mount, error) {
	if len(line.Files) == 0 {
		return line, nil, nil
	}
	if len(line.CmdLine) != 1 || !line.PrependShell {
		return line, nil, errors.New("a heredoc is for a command of the shell")
	}
	first := line.Files[0]
	if parser.MustParseHeredoc(line.CmdLine[0]) == nil {
		var text strings.Builder
		text.WriteString(line.CmdLine[0])
		for _, file := range line.Files {
			text.WriteString("\n" + file.Data + file.Name)
		}
		line.CmdLine = []string{text.String()}
		return line, nil, nil
	}
	content := first.Data
	if first.Chomp {
		content = parser.ChompHeredocContent(content)
	}
	if !strings.HasPrefix(content, "#!") {
		line.CmdLine = []string{content}
		return line, nil, nil
	}
	if err := checkFileName(first.Name); err != nil {
		return line, nil, err
	}
	mount := &Mount{Type: MountBind, Target: scriptDir, ReadOnly: true, From: Source{Scratch: true}, Files: []File{{Name: first.Name, Content: content, Mode: 0o755}}}
	line.CmdLine = []string{path.Join(scriptDir, first.Name)}
	return line, mount, nil
}

// checkFileName checks that the name of a heredoc can be one of a file.
func checkFileName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("a heredoc of the name %q can't be a file", name)
	}
	return nil
}

// historyOf returns a command as an image's history has it: with the arguments that it saw.
func historyOf(args []string, d *draft) string {
	var seen []string
	for _, name := range d.args {
		value, ok := lookup(d.env, name)
		if !ok {
			value = d.values[name]
		}
		if text := name + "=" + value; !slices.Contains(seen, text) {
			seen = append(seen, text)
		}
	}
	if len(seen) > 0 {
		seen = append([]string{fmt.Sprintf("|%d", len(seen))}, seen...)
	}
	return strings.Join(append(seen, args...), " ")
}

// mount plans what is mounted.
func (p *planner) mount(ctx context.Context, d *draft, m *instructions.Mount) (Mount, error) {
	mount := Mount{Type: MountType(m.Type), ReadOnly: m.ReadOnly, Path: relative(m.Source), ID: m.CacheID, Sharing: string(m.CacheSharing), Size: m.SizeLimit, Required: m.Required}
	if m.Type == instructions.MountTypeSSH {
		return mount, refuse("it", "give a key as a secret, by --mount=type=secret and `--secret id=key,src=FILE`")
	}
	if m.Type == instructions.MountTypeSecret {
		return secret(mount, d, m)
	}
	if m.Target == "" {
		return mount, errors.New("it needs a target")
	}
	if mount.Target = absolute(d.stage.Config.Config.WorkingDir, m.Target); mount.Target == "/" {
		return mount, errors.New("its target can't be /")
	}
	mount.Mode = 0o755
	if err := setOwner(&mount, m); err != nil {
		return mount, err
	}
	switch {
	case m.Type == instructions.MountTypeTmpfs && (m.From != "" || m.Source != ""):
		return mount, errors.New("a tmpfs has no source")
	case m.Type == instructions.MountTypeTmpfs, m.Type == instructions.MountTypeCache && m.From == "":
		mount.From = Source{Scratch: true}
	case m.From != "":
		var err error
		if mount.From, err = p.source(ctx, d, m.From); err != nil {
			return mount, err
		}
	}
	if m.Type == instructions.MountTypeCache {
		if mount.ID == "" {
			mount.ID = mount.Target
		}
		if mount.Sharing == "" {
			mount.Sharing = string(instructions.MountSharingShared)
		}
	}
	return mount, nil
}

// secret plans the mount of a secret.
func secret(mount Mount, d *draft, m *instructions.Mount) (Mount, error) {
	if m.Source != "" {
		mount.ID = m.Source
	}
	if mount.ID == "" {
		mount.ID = path.Base(m.Target)
	}
	mount.Path, mount.ReadOnly, mount.From, mount.Mode = "", true, Source{Scratch: true}, 0o400
	if m.Env != nil {
		if mount.Env = *m.Env; mount.Env == "" {
			mount.Env = mount.ID
		}
		if strings.ContainsAny(mount.Env, "=\x00") {
			return mount, fmt.Errorf("%q can't be the name of a variable", mount.Env)
		}
	}
	switch {
	case m.Target != "":
		mount.Target = absolute(d.stage.Config.Config.WorkingDir, m.Target)
	case m.Env == nil:
		mount.Target = "/run/secrets/" + path.Base(mount.ID)
	}
	return mount, setOwner(&mount, m)
}

// setOwner sets the owner and permissions of a mount.
func setOwner(mount *Mount, m *instructions.Mount) error {
	if m.Mode != nil {
		if *m.Mode > 0o7777 {
			return fmt.Errorf("there is no mode %o", *m.Mode)
		}
		mount.Mode = uint32(*m.Mode)
	}
	if m.UID != nil {
		mount.UID = uint32(*m.UID)
	}
	if m.GID != nil {
		mount.GID = uint32(*m.GID)
	}
	return nil
}

// source finds out where files come from, by the name or number of a stage, or by the name of an
// image.
func (p *planner) source(ctx context.Context, d *draft, from string) (Source, error) {
	if from == "scratch" {
		return Source{Scratch: true}, nil
	}
	number, isStage := instructions.HasStage(p.stages, from)
	if n, err := strconv.Atoi(from); err == nil {
		number, isStage = n, true
		if n < 0 || n >= len(p.stages) {
			return Source{}, fmt.Errorf("from=%s: there is no stage of that number", from)
		}
	}
	switch {
	case !isStage:
		return Source{Image: from}, nil
	case number == d.number:
		return Source{}, fmt.Errorf("from=%s: this is stage %s", from, d.stage.Name)
	case number > d.number:
		return Source{}, fmt.Errorf("from=%s: that stage comes later, in line %d", from, firstLine(p.stages[number].Location))
	}
	needed, err := p.need(ctx, number)
	if err != nil {
		return Source{}, err
	}
	return Source{Stage: needed.stage}, nil
}

// relative returns a path below the root of a source.
func relative(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }
