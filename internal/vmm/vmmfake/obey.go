package vmmfake

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"mvdan.cc/sh/v3/expand"
	"mvdan.cc/sh/v3/interp"
	"mvdan.cc/sh/v3/syntax"
)

// fromPort is a program whose input is the channel, which the shell can't do.
var fromPort = regexp.MustCompile(`^head -c (\d+) <&3 \| (.*)$`)

// Initramfs makes an initramfs whose init obeys package vmmtest, whatever the script that
// does so in a guest with a kernel.
func Initramfs(t testing.TB, _ string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "initramfs")
	if err := os.WriteFile(path, []byte(scriptMark), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// obey is what package vmmtest has a guest's init do, in place of that script: it runs each
// line that comes in by the channel, and answers with its output and a line with the exit
// status.
func (g *guest) obey(port gated) {
	in := bufio.NewReader(port)
	p := &process{args: []string{"init"}, env: []string{"PATH=/bin"}, dir: "/", guest: g, stdout: port, stderr: port, stdin: strings.NewReader("")}
	p.ctx = context.Background()
	if !g.restored {
		_, _ = fmt.Fprintln(port, "vmmtest-ready")
	}
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		p.stdin = strings.NewReader("")
		if found := fromPort.FindStringSubmatch(strings.TrimSpace(line)); found != nil {
			var size int64
			_, _ = fmt.Sscan(found[1], &size)
			p.stdin, line = io.LimitReader(in, size), "cat | "+found[2]
		}
		code := p.eval(line)
		if code == evalExit {
			g.panicKernel("Attempted to kill init! exitcode=0x00000100")
		}
		_, _ = fmt.Fprintf(port, "vmmtest-status %d\n", code)
	}
}

// evalExit is what eval returns when the shell is to end.
const evalExit = -1

// eval runs a line, with the variables that lines before it have set.
func (p *process) eval(line string) int {
	file, err := syntax.NewParser(syntax.Variant(syntax.LangPOSIX)).Parse(strings.NewReader(line), "init")
	if err != nil {
		p.say(err.Error())
		return 2
	}
	vars := p.guest.vars
	env := p.env
	for name, value := range vars {
		env = append(env, name+"="+value)
	}
	shell := *p
	shell.env = env
	runner, err := shell.shell()
	if err != nil {
		p.say(err.Error())
		return 2
	}
	err = runner.Run(p.ctx, file)
	p.guest.mu.Lock()
	defer p.guest.mu.Unlock()
	for name, v := range runner.Vars {
		if v.Kind == expand.String {
			vars[name] = v.String()
		}
	}
	code, failed := errors.AsType[interp.ExitStatus](err)
	switch {
	case runner.Exited():
		return evalExit
	case failed:
		return int(code)
	case err != nil:
		p.say(err.Error())
		return 1
	}
	return 0
}
