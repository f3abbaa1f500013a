package kernelbuild

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"github.com/smolvm/smolvm"
)

// tool is something that a build needs of the host, and the package that has it.
type tool struct {
	what, pkg string
	// header is a C header with what is to be linked by flag; empty: what is a program.
	header, flag string
}

// needed returns what the build needs. The headers of OpenSSL are for signing modules, of which
// there are none; objtool can't be configured off on x86-64, and needs libelf.
func needed() []tool {
	return []tool{
		{what: "gcc", pkg: "gcc"}, {what: "make", pkg: "make"}, {what: "flex", pkg: "flex"}, {what: "bison", pkg: "bison"},
		{what: "bc", pkg: "bc"}, {what: "tar", pkg: "tar"}, {what: "xz", pkg: "xz-utils"},
		{what: "ld", pkg: "binutils"}, {what: "strip", pkg: "binutils"},
		{what: "the C library's headers", pkg: "libc6-dev", header: "stdio.h"},
		{what: "libelf's headers", pkg: "libelf-dev", header: "gelf.h", flag: "-lelf"},
	}
}

// checkTools checks that all is there that the build needs of the host, and names all that is not.
func checkTools(ctx context.Context) error {
	var what, packages []string
	miss := func(t tool) {
		what = append(what, t.what)
		if len(packages) == 0 || packages[len(packages)-1] != t.pkg {
			packages = append(packages, t.pkg)
		}
	}
	for _, t := range needed() {
		if t.header != "" {
			if !compiles(ctx, t) {
				miss(t)
			}
		} else if _, err := exec.LookPath(t.what); err != nil {
			miss(t)
		}
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if len(what) == 0 {
		return nil
	}
	return &smolvm.Error{Hint: "sudo apt-get install " + strings.Join(packages, " "),
		Err: fmt.Errorf("what a kernel is built with is not on this host: %s", strings.Join(what, ", "))}
}

// compiles reports whether a program can use a header, and link what it is for.
func compiles(ctx context.Context, t tool) bool {
	args := []string{"-x", "c", "-", "-include", t.header, "-o", "/dev/null"}
	if t.flag != "" {
		args = append(args, t.flag)
	}
	cmd := exec.CommandContext(ctx, "gcc", args...)
	cmd.Stdin = strings.NewReader("int main(void) { return 0; }\n")
	return cmd.Run() == nil
}

// compiler tells what the kernel would be built by: it is part of what decides the kernel.
func compiler(ctx context.Context) (string, error) {
	var lines []string
	for _, program := range []string{"gcc", "ld"} {
		out, err := exec.CommandContext(ctx, program, "--version").Output()
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		line, _, _ := strings.Cut(string(out), "\n")
		if err != nil || strings.TrimSpace(line) == "" {
			return "", errors.Join(fmt.Errorf("ask %s for its version: it answers %.100q", program, line), err)
		}
		lines = append(lines, strings.TrimSpace(line))
	}
	return strings.Join(lines, ", "), nil
}
