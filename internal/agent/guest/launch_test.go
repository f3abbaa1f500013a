package guest

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == launchCommand {
		os.Exit(Main("test", os.Args))
	}
	os.Exit(m.Run())
}

// A command is started in the same way whether it is forked or launched, and what keeps it from
// being started is told in the same words.
func TestLaunch(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	for path, text := range map[string]string{script: "#!/bin/sh\n", filepath.Join(dir, "torn"): "#!/no/such/shell\n", filepath.Join(dir, "text"): "text\n"} {
		if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	run := func(launched bool, dir string, argv ...string) (output string, code int, err error) {
		var out, errOut bytes.Buffer
		r := newReaper(false)
		r.servesFiles = func() bool { return launched }
		user, err := findUser("root")
		if err != nil {
			t.Fatal(err)
		}
		if os.Getuid() != 0 {
			user.uid, user.gid = uint32(os.Getuid()), uint32(os.Getgid())
		}
		command := &job{argv: argv, env: []string{"PATH=/usr/bin:/bin", "A=b c"}, dir: dir, user: user, noStdin: true, stdout: &out, stderr: &errOut}
		if err := command.start(r); err != nil {
			return "", 0, err
		}
		if command.pid <= 0 {
			t.Errorf("%q has process id %d", argv, command.pid)
		}
		status := command.wait()
		return out.String() + errOut.String(), status.ExitStatus(), nil
	}
	for name, test := range map[string]struct {
		dir  string
		argv []string
		want error // nil: it is started
	}{
		"output and status":     {dir, []string{"sh", "-c", `echo "$0 $1 $A $(pwd) $(ls /proc/self/fd | wc -l)"; exit 7`, "x", "y z"}, nil},
		"relative":              {dir, []string{"./script"}, nil},
		"signal":                {dir, []string{"sh", "-c", "kill -9 $$"}, nil},
		"no such command":       {dir, []string{"./nosuch"}, errNotFound},
		"no such directory":     {"/no/such", []string{"true"}, nil},
		"a file as directory":   {script, []string{"true"}, nil},
		"interpreter missing":   {dir, []string{"./torn"}, errNotFound},
		"a directory":           {dir, []string{dir}, fs.ErrPermission},
		"not executable format": {dir, []string{"./text"}, unix.ENOEXEC},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			forkOut, forkCode, forkErr := run(false, test.dir, test.argv...)
			out, code, err := run(true, test.dir, test.argv...)
			if out != forkOut || code != forkCode || (err == nil) != (forkErr == nil) || err != nil && err.Error() != forkErr.Error() {
				t.Errorf("launched: %q, %d, %v; forked: %q, %d, %v", out, code, err, forkOut, forkCode, forkErr)
			}
			if test.want != nil && !errors.Is(err, test.want) || strings.HasPrefix(name, "no such directory") && err == nil {
				t.Errorf("error is %v, want %v", err, test.want)
			}
		})
	}
}
