package launcher

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/namespace"
)

// supervise starts the command and waits for its end. This process is the first of its PID
// namespace: when it ends, so does all that is in there.
func (l *launch) supervise() error {
	if os.Getpid() != 1 {
		return l.failed(namespace.StepExecute, errors.New("it has no PID namespace of its own"))
	}
	// The command is forked by this thread, and has its rights.
	if err := l.drop(); err != nil {
		return l.failed(namespace.StepDrop, err)
	}
	pidfd := -1
	stdin := os.NewFile(uintptr(l.stdin), "stdin")
	cmd := &exec.Cmd{
		Path: l.Path, Args: l.Args, Env: l.Env,
		Stdin: stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		SysProcAttr: &syscall.SysProcAttr{PidFD: &pidfd},
	}
	for i := range l.Files {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(firstFile+i), "inherited"))
	}
	if err := cmd.Start(); err != nil {
		return l.failed(namespace.StepExecute, err)
	}
	if pidfd < 0 {
		return l.failed(namespace.StepExecute, errors.New("this kernel has no file for a process; it is older than 5.4"))
	}
	if err := l.report(namespace.Report{Started: true}, pidfd); err != nil {
		return err
	}
	_ = unix.Close(pidfd)
	// What is the command's alone: the end of a pipe is to be seen when the command ends.
	for _, file := range append(cmd.ExtraFiles, stdin, os.Stdin, os.Stdout, os.Stderr) {
		_ = file.Close()
	}
	// When the host shuts down, all processes get these. The shim ends the VM in order then.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	debug.FreeOSMemory() // it only waits from now on
	wait, err := reap(cmd.Process.Pid)
	if err != nil {
		return err
	}
	return l.report(namespace.Report{Exit: describe(wait)}, -1)
}

// reap waits for all processes whose parent this one is, which those become that have lost
// theirs, until the command has ended.
func reap(command int) (unix.WaitStatus, error) {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, os.NewSyscallError("wait4", err)
		case pid == command:
			return status, nil
		}
	}
}

// describe says how a process has ended, in the words of [os.ProcessState].
func describe(wait unix.WaitStatus) string {
	if !wait.Signaled() {
		return fmt.Sprintf("exit status %d", wait.ExitStatus())
	}
	exit := "signal: " + wait.Signal().String()
	if wait.CoreDump() {
		exit += " (core dumped)"
	}
	return exit
}
