package vmmfake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"mvdan.cc/sh/v3/expand"
	"mvdan.cc/sh/v3/interp"
	"mvdan.cc/sh/v3/syntax"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// process is one program that runs in the guest.
type process struct {
	args           []string
	env            []string
	dir            string
	tty            *wire.TTY
	stdin          io.Reader
	stdout, stderr io.Writer

	ctx   context.Context // done when the process gets a signal
	guest *guest
}

// status is how a process ended.
type status struct {
	code   int
	signal string // by its name; empty: none
}

// signalError is the cause of the end of a process that got a signal of that name.
type signalError string

func (s signalError) Error() string { return "signal " + string(s) }

// Exit statuses of a command that could not be started, as shells have them.
const (
	exitNotFound = 127
	exitNotRun   = 126
)

// searchPath is where programs are looked for.
const searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// run runs a command to its end, or to that of ctx, whose cause may be a [signalError].
func (g *guest) run(ctx context.Context, p *process) status {
	p.guest, p.ctx = g, ctx
	if p.stdin == nil {
		p.stdin = strings.NewReader("")
	}
	if p.stdout == nil {
		p.stdout, p.stderr = io.Discard, io.Discard
	}
	base := []string{"PATH=" + searchPath, "HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/sh"}
	if hello := g.current(); hello != nil {
		base = append(base, "HOSTNAME="+hello.Hostname)
	}
	p.env = append(base, p.env...)
	if p.dir == "" {
		p.dir = "/root"
	}
	ended := make(chan int, 1)
	go func() { ended <- p.exec() }()
	select {
	case code := <-ended:
		if signal, ok := errors.AsType[signalError](context.Cause(ctx)); ok && code != 0 {
			return status{signal: string(signal)}
		}
		return status{code: code}
	case <-ctx.Done(): // whatever it does
	}
	if signal, ok := errors.AsType[signalError](context.Cause(ctx)); ok {
		return status{signal: string(signal)}
	}
	return status{signal: "KILL"}
}

// exec finds the program and runs it.
func (p *process) exec() int {
	p.guest.machine.cpu.step()
	if info, err := p.guest.files.stat(p.dir, true); err != nil || !info.IsDir() {
		p.say("smolvm: chdir " + p.dir + ": no such file or directory")
		return exitNotFound
	}
	name, text, err := p.find(p.args[0])
	if err != nil {
		p.say(fmt.Sprintf("smolvm: %s: %v", p.args[0], err))
		if errors.Is(err, fs.ErrPermission) {
			return exitNotRun
		}
		return exitNotFound
	}
	if builtin, found := strings.CutPrefix(text, programMark); found {
		builtin, _, _ = strings.Cut(builtin, "\n")
		return programs[builtin](p)
	}
	return p.script(text, append([]string{name}, p.args[1:]...))
}

// say prints an error of the program's.
func (p *process) say(text string) { _, _ = fmt.Fprintln(p.stderr, text) }

// fail prints an error, and returns an exit status.
func (p *process) fail(err error) int {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		err = fmt.Errorf("%s: %w", pathErr.Path, pathErr.Err)
	}
	p.say(p.args[0] + ": " + err.Error())
	return 1
}

// find returns the path of a program, and what is in its file.
func (p *process) find(name string) (found, text string, err error) {
	dirs := strings.Split(p.variable("PATH"), ":")
	if strings.Contains(name, "/") {
		dirs, name = []string{""}, p.path(name)
	}
	err = fs.ErrNotExist
	for _, dir := range dirs {
		at := path.Join(dir, name)
		info, statErr := p.guest.files.stat(at, true)
		switch {
		case statErr != nil:
			continue
		case info.IsDir() || info.Mode()&0o111 == 0:
			err = fs.ErrPermission
			continue
		}
		content, err := p.guest.files.read(at)
		return at, string(content), err
	}
	return "", "", err
}

// variable returns the value of an environment variable.
func (p *process) variable(name string) string {
	for _, entry := range slices.Backward(p.env) {
		if value, found := strings.CutPrefix(entry, name+"="); found {
			return value
		}
	}
	return ""
}

// path returns the absolute path of a file.
func (p *process) path(name string) string {
	if path.IsAbs(name) {
		return path.Clean(name)
	}
	return path.Join(p.dir, name)
}

// script runs a shell's script.
func (p *process) script(text string, args []string) int {
	file, err := syntax.NewParser(syntax.Variant(syntax.LangPOSIX)).Parse(strings.NewReader(text), args[0])
	if err != nil {
		p.say(err.Error())
		return 2
	}
	runner, err := p.shell()
	if err != nil {
		p.say(err.Error())
		return 2
	}
	if len(args) > 1 {
		runner.Params = args[1:]
	}
	err = runner.Run(p.ctx, file)
	if code, ok := errors.AsType[interp.ExitStatus](err); ok {
		return int(code)
	}
	if err != nil {
		p.say(err.Error())
		return 1
	}
	return 0
}

// shell returns a shell whose files and programs are the guest's.
func (p *process) shell() (*interp.Runner, error) {
	g := p.guest
	absolute := func(ctx context.Context, name string) string {
		if path.IsAbs(name) {
			return name
		}
		return path.Join(interp.HandlerCtx(ctx).Dir, name)
	}
	runner, err := interp.New(
		interp.Env(expand.ListEnviron(p.env...)),
		interp.StdIO(p.stdin, p.stdout, p.stderr),
		interp.CallHandler(func(_ context.Context, args []string) ([]string, error) {
			g.machine.cpu.step()
			return args, nil
		}),
		interp.ExecHandlers(func(interp.ExecHandlerFunc) interp.ExecHandlerFunc { return p.child }),
		interp.OpenHandler(func(ctx context.Context, name string, flag int, perm os.FileMode) (io.ReadWriteCloser, error) {
			return g.open(absolute(ctx, name), flag, perm)
		}),
		interp.ReadDirHandler2(func(ctx context.Context, name string) ([]fs.DirEntry, error) {
			found, err := g.files.list(absolute(ctx, name))
			var entries []fs.DirEntry
			for _, one := range found {
				entries = append(entries, one)
			}
			return entries, err
		}),
		interp.StatHandler(func(ctx context.Context, name string, follow bool) (fs.FileInfo, error) {
			name = absolute(ctx, name)
			if device, ok := g.device(name); ok {
				_ = device.Close()
				return info{name: path.Base(name), node: node{Mode: fs.ModeDevice | 0o666}}, nil
			}
			return g.files.stat(name, follow)
		}),
		interp.AccessHandler(func(ctx context.Context, name string, _ interp.AccessMode) error {
			_, err := g.files.stat(absolute(ctx, name), true)
			return err
		}),
	)
	if err != nil {
		return nil, err
	}
	runner.Dir = p.dir // of the guest's; the option would look for it on the host
	return runner, nil
}

// child runs a program for a shell.
func (p *process) child(ctx context.Context, args []string) error {
	h := interp.HandlerCtx(ctx)
	c := &process{args: args, dir: h.Dir, tty: p.tty, stdin: h.Stdin, stdout: h.Stdout, stderr: h.Stderr, ctx: ctx, guest: p.guest}
	if c.stdin == nil || c.stdin == (*os.File)(nil) {
		c.stdin = strings.NewReader("")
	}
	h.Env.Each(func(name string, v expand.Variable) bool {
		if v.Exported {
			c.env = append(c.env, name+"="+v.String())
		}
		return true
	})
	ended := make(chan int, 1)
	go func() { ended <- c.exec() }()
	select {
	case code := <-ended:
		if code != 0 {
			return interp.ExitStatus(uint8(code))
		}
		return nil
	case <-ctx.Done(): // whatever it does
		return context.Cause(ctx)
	}
}
