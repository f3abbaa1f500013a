package kernelbuild

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
)

const (
	// niceness is that of the programs of a build, which takes long and has time.
	niceness = 10
	// killDelay is how long they may take to end when they were asked to.
	killDelay = 5 * time.Second
	// shownLines is how many lines of its log a failed build shows, and shownBytes how long they
	// may be.
	shownLines, shownBytes = 15, 4 << 10
	// logBytes bounds each of the two files of a log; a whole build writes some 150 KB.
	logBytes = 4 << 20
)

// runner runs programs of a build, in a group of processes each, so that all end together.
type runner struct {
	dir  string // where they run
	log  *ring.Log
	lock *os.File
}

// run runs a program. Line is told of each line that it writes; it may be nil. When ctx is done, or
// this process dies, the program and all that it has started are ended.
func (r runner) run(ctx context.Context, stdin io.Reader, line func(), name string, args ...string) error {
	cmd := exec.Command(name, args...) //nolint:noctx // The group is ended, not the program alone.
	cmd.Dir, cmd.Env, cmd.Stdin = r.dir, buildEnv(), stdin
	out := &lineWriter{w: r.log, line: line}
	cmd.Stdout, cmd.Stderr = out, out
	// Whoever is left of a build whose smolvm has died keeps the lock of the directory by this.
	cmd.ExtraFiles = []*os.File{r.lock}
	// make ends what it has started, and removes what is half made, on this signal.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.WaitDelay = killDelay
	child, err := proc.Start(cmd)
	if err != nil {
		return err
	}
	// That it is as urgent as others is no reason to have no kernel.
	_ = unix.Setpriority(unix.PRIO_PGRP, child.PID(), niceness)
	select {
	case <-child.Done():
	case <-ctx.Done():
		endGroup(child)
		return fmt.Errorf("build was interrupted: %w", context.Cause(ctx))
	}
	if child.Success() {
		return nil
	}
	return fmt.Errorf("%s: %s", name, child.Exit())
}

// endGroup ends a child and all of its group, and returns when the child has ended.
func endGroup(child *proc.Child) {
	_ = unix.Kill(-child.PID(), unix.SIGTERM)
	select {
	case <-child.Done():
	case <-time.After(killDelay):
	}
	// Its number is another group's only when nobody of this one is left.
	_ = unix.Kill(-child.PID(), unix.SIGKILL)
	<-child.Done()
}

// buildEnv is the environment of the programs: nothing that this process was given changes what is
// built, and the same source gives the same bytes.
func buildEnv() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "LC_ALL=C", "TZ=UTC",
		"KBUILD_BUILD_USER=smolvm", "KBUILD_BUILD_HOST=smolvm", "KBUILD_BUILD_VERSION=1", "KBUILD_BUILD_TIMESTAMP=@0",
	}
}

// lineWriter passes on what is written, and tells of each line.
type lineWriter struct {
	w    io.Writer
	line func()
}

func (l *lineWriter) Write(p []byte) (int, error) {
	if l.line != nil {
		for range bytes.Count(p, []byte{'\n'}) {
			l.line()
		}
	}
	return l.w.Write(p)
}

// explain adds the end of the log to an error of a program of the build.
func (r runner) explain(what, logPath string, err error) error {
	lines := strings.Split(strings.TrimSpace(r.log.Tail(shownBytes)), "\n")
	err = errors.Join(err, errors.New(strings.Join(lines[max(0, len(lines)-shownLines):], "\n")))
	return &smolvm.Error{Hint: "all that the build has said is in " + logPath, Err: fmt.Errorf("%s: %w", what, err)}
}
