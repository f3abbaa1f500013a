// Package proc starts child processes that can't outlive their parent, and finds
// out about processes that are not our children.
//
// A process that is not our child is named by its pid and its start time: pids are
// reused, and a process of another start time is another process.
package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// Child is a process that was started by [Start]. It gets a signal of the kernel's when
// this process dies, which kills it by default.
type Child struct {
	pid  int
	done chan struct{}

	// Written before done is closed, read after.
	state   *os.ProcessState
	waitErr error

	mu     sync.Mutex // guards the following, against signals to a reaped pid
	reaped bool
	proc   *os.Process
}

// Start starts cmd. Its SysProcAttr may be set; the parent-death signal is added, SIGKILL if it
// has none.
//
// The kernel sends that signal when the *thread* that forked the child ends, which
// in Go may be at any time. So the goroutine that forks keeps its thread to itself
// until it has reaped the child.
func Start(cmd *exec.Cmd) (*Child, error) {
	return StartIn(cmd, func(fork func() error) error { return fork() })
}

// StartIn is [Start], but calls within on the thread that forks. Within gives the thread what
// the child is to inherit, and calls fork. It need not restore the thread: nothing else will
// run on it.
func StartIn(cmd *exec.Cmd, within func(fork func() error) error) (*Child, error) {
	attr := &syscall.SysProcAttr{}
	if cmd.SysProcAttr != nil {
		*attr = *cmd.SysProcAttr
	}
	if attr.Pdeathsig == 0 {
		attr.Pdeathsig = syscall.SIGKILL
	}
	cmd.SysProcAttr = attr

	child := &Child{done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, after the child.
		runtime.LockOSThread()
		if err := within(cmd.Start); err != nil {
			started <- err
			return
		}
		child.pid, child.proc = cmd.Process.Pid, cmd.Process
		started <- nil
		child.wait(cmd)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return child, nil
}

func (c *Child) wait(cmd *exec.Cmd) {
	err := cmd.Wait()
	c.mu.Lock()
	c.reaped = true
	c.mu.Unlock()
	c.state = cmd.ProcessState
	if _, isExit := errors.AsType[*exec.ExitError](err); !isExit {
		c.waitErr = err
	}
	close(c.done)
}

// PID returns the process id of the child.
func (c *Child) PID() int { return c.pid }

// Done returns a channel that is closed when the child has ended and has been reaped.
func (c *Child) Done() <-chan struct{} { return c.done }

// Exit says how the child ended, as in "exit status 1" or "signal: killed". It may
// be called only after Done is closed.
func (c *Child) Exit() string {
	if c.waitErr != nil {
		return c.waitErr.Error()
	}
	return c.state.String()
}

// Success reports whether the child ended by itself with status 0. It may be called
// only after Done is closed.
func (c *Child) Success() bool { return c.waitErr == nil && c.state.Success() }

// CPUTime returns the processor time that the child has used. It may be called only after Done
// is closed.
func (c *Child) CPUTime() time.Duration {
	if c.state == nil {
		return 0
	}
	return c.state.UserTime() + c.state.SystemTime()
}

// Signal sends a signal. A child that has ended already is a success.
func (c *Child) Signal(sig os.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reaped {
		return nil
	}
	if err := c.proc.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal process %d: %w", c.pid, err)
	}
	return nil
}

// KillLate kills a process that was asked to end and has not when ctx is done. It returns when done
// is closed: the process has ended then, and what follows from that is finished.
func KillLate(ctx context.Context, process interface{ Kill() error }, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	if err := process.Kill(); err != nil {
		return err
	}
	<-done
	return nil
}

// Kill kills the child and waits until it has been reaped.
func (c *Child) Kill() error {
	if err := c.Signal(os.Kill); err != nil {
		return err
	}
	<-c.done
	return nil
}
