package proc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// errGone reports that there is no such process, or only its remains.
var errGone = errors.New("process is gone")

// StartTime returns when a process started, in clock ticks since the host's boot: the
// 22nd field of /proc/<pid>/stat; see proc(5).
func StartTime(pid int) (uint64, error) {
	start, state, err := stat(pid)
	if err != nil {
		return 0, fmt.Errorf("start time of process %d: %w", pid, err)
	}
	if state == 'Z' || state == 'X' {
		return 0, fmt.Errorf("start time of process %d: %w", pid, errGone)
	}
	return start, nil
}

// Alive reports whether the process is there. A zombie is not, nor is another process
// that has got the same pid.
func Alive(pid int, start uint64) bool {
	got, err := StartTime(pid)
	return err == nil && got == start
}

// CPUTime returns the CPU time that a process has used, in steps of a clock tick: the 14th and
// 15th fields of /proc/<pid>/stat.
func CPUTime(pid int) (time.Duration, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, errGone)
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	const userField, systemField = 14 - 3, 15 - 3
	if len(fields) <= systemField {
		return 0, fmt.Errorf("CPU time of process %d: unexpected text %q", pid, text)
	}
	var ticks uint64
	for _, field := range []string{fields[userField], fields[systemField]} {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / clockTicks, nil
}

// Resident returns how much of a process is in memory, in bytes, with what it shares: the 2nd
// field of /proc/<pid>/statm, in pages.
func Resident(pid int) (int64, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0, fmt.Errorf("memory of process %d: %w", pid, errGone)
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(text), &size, &resident); err != nil {
		return 0, fmt.Errorf("memory of process %d: unexpected text %q", pid, text)
	}
	return resident * int64(os.Getpagesize()), nil
}

// clockTicks is the number of clock ticks in a second as the kernel tells them to
// programs; it is the same on all architectures that Go knows. See sysconf(3).
const clockTicks = 100

func stat(pid int) (start uint64, state byte, err error) {
	if pid <= 0 {
		return 0, 0, errGone
	}
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, errGone
	}
	return parseStat(text)
}

// parseStat reads what stands behind the program's name, which may itself hold
// spaces and parentheses.
func parseStat(text []byte) (start uint64, state byte, err error) {
	end := bytes.LastIndexByte(text, ')')
	fields := strings.Fields(string(text[end+1:]))
	// The first of these fields is the 3rd of the line, the state.
	const startField = 22 - 3
	if end < 0 || len(fields) <= startField || len(fields[0]) != 1 {
		return 0, 0, fmt.Errorf("unexpected text %q", text)
	}
	start, err = strconv.ParseUint(fields[startField], 10, 64)
	return start, fields[0][0], err
}

// BootID names the host's present boot; a pid of another boot means nothing.
func BootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

// Wait returns when the process has ended, at once if it is gone already.
func Wait(ctx context.Context, pid int, start uint64) error {
	fd, err := open(pid, start)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", pid, err)
	}
	defer func() { _ = unix.Close(fd) }()
	return waitFD(ctx, pid, fd)
}

// KillTime is how long a process that was killed may take to be gone. It is longer only if the
// process waits within the kernel, for a disk or a network file system.
const KillTime = 2 * time.Second

// ErrUnkillable is for the cause of a context that bounds [Kill].
var ErrUnkillable = errors.New("it was killed and is still there, waiting for a disk or a file system of the host; try again when that answers")

// Kill kills the process and waits until it has ended. A process that is gone
// already is a success; a process of another start time is left alone.
func Kill(ctx context.Context, pid int, start uint64) error {
	fd, err := open(pid, start)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return waitFD(ctx, pid, fd)
}

// open returns a pidfd, which goes on to stand for this process when its pid is
// reused. The start time is checked after that, so that it is this process's.
func open(pid int, start uint64) (int, error) {
	if pid <= 0 {
		return -1, errGone
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return -1, errGone // EINVAL: the pid is that of a thread by now
	}
	if err != nil {
		return -1, err
	}
	if !Alive(pid, start) {
		_ = unix.Close(fd)
		return -1, errGone
	}
	return fd, nil
}

// waitFD waits until the process of a pidfd has ended.
func waitFD(ctx context.Context, pid, fd int) error {
	// A pipe that closes with ctx, to wake the poll.
	var wake [2]int
	if err := unix.Pipe2(wake[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("wait for process %d: %w", pid, err)
	}
	defer func() { _ = unix.Close(wake[0]) }()
	stop := context.AfterFunc(ctx, func() { _ = unix.Close(wake[1]) })
	defer func() {
		if stop() {
			_ = unix.Close(wake[1])
		}
	}()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wake[0]), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for process %d: %w", pid, err)
		case fds[0].Revents != 0:
			return nil
		case fds[1].Revents != 0:
			return fmt.Errorf("wait for process %d: %w", pid, context.Cause(ctx))
		}
	}
}
