package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// launchReport is the descriptor on which a program that is to become a command says why it
// could not.
const launchReport = 3

// launch starts the command by a program of the agent's that goes to the command's directory and
// becomes the command. The command itself can't be forked where its directory or its program may
// be in a file system that this process serves: a thread that forks waits until the program is
// executed, and Go's runtime may have to wait for that thread before anything is served.
func (j *job) launch(r *reaper, path string, argv []string, attr *syscall.ProcAttr) error {
	report, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = report.Close() }()
	own := *attr
	own.Dir, own.Files = "/", append(append([]uintptr{}, attr.Files...), theirs.Fd())
	argv = append([]string{"smolvm-agent", launchCommand, attr.Dir, path}, argv...)
	j.pid, j.status, err = r.start(func() (int, error) { return j.fork("/proc/self/exe", argv, &own) })
	_ = theirs.Close()
	if err != nil {
		return err
	}
	text, err := io.ReadAll(io.LimitReader(report, 16)) // ends when it has become the command
	if err != nil || len(text) == 0 {
		return err
	}
	<-j.status
	number, err := strconv.Atoi(string(text))
	if err != nil {
		return fmt.Errorf("the command could not be launched: %q", text)
	}
	return syscall.Errno(number)
}

// launchMain becomes a command in a directory. It returns if that fails.
func launchMain(dir, path string, argv []string) int {
	unix.CloseOnExec(launchReport)
	var err error
	if dir != "" {
		err = unix.Chdir(dir)
	}
	if err == nil {
		err = syscall.Exec(path, argv, os.Environ())
	}
	number := unix.EINVAL
	_ = errors.As(err, &number)
	_, _ = io.WriteString(os.NewFile(launchReport, "report"), strconv.Itoa(int(number)))
	return exitNotRun
}
