package firecracker

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/vmm/console"
)

// ending watches a guest's console for the kernel's farewell. On a PC a guest can't switch
// Firecracker's machine off: a kernel that is to power off says so and halts its CPUs, and
// Firecracker runs on.
type ending struct {
	halted chan struct{} // receives when the kernel says that it halts

	mu   sync.Mutex // guards the following
	line []byte     // what there is of the last line
	last console.Farewell
}

func newEnding() *ending { return &ending{halted: make(chan struct{}, 1)} }

// maxLine bounds how much is kept of a line, in bytes. A farewell is shorter.
const maxLine = 256

// Write implements [io.Writer].
func (e *ending) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for rest := p; len(rest) > 0; {
		line, after, whole := bytes.Cut(rest, []byte{'\n'})
		e.line = append(e.line, line[:min(len(line), maxLine-len(e.line))]...)
		if whole {
			e.take(console.FarewellOf(string(e.line)))
			e.line = e.line[:0]
		}
		rest = after
	}
	return len(p), nil
}

func (e *ending) take(farewell console.Farewell) {
	if farewell == console.None {
		return
	}
	e.last = farewell
	if farewell == console.Halted {
		select {
		case e.halted <- struct{}{}:
		default:
		}
	}
}

// seen returns the last farewell on the console.
func (e *ending) seen() console.Farewell {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.last
}

// awaitEnd returns when Firecracker has ended. It ends one whose guest has halted.
func (i *instance) awaitEnd() {
	for {
		select {
		case <-i.process.Done():
			return
		case <-i.ending.halted:
		}
		if !i.isStill() {
			continue // somebody else has printed it
		}
		i.mu.Lock()
		i.halted = !i.killed
		i.mu.Unlock()
		_ = i.process.Signal(unix.SIGKILL)
	}
}

const (
	// stillTime is for how long the CPUs of a guest do nothing that has halted. A guest that
	// runs has timers, and has just printed something.
	stillTime = 50 * time.Millisecond
	// stillLooks is how often that is looked for.
	stillLooks = 40
)

// isStill reports whether the guest's CPUs have stopped, or Firecracker has ended. Nothing tells
// either of a CPU that has halted for good, so the time that the CPUs have used is compared.
func (i *instance) isStill() bool {
	tick := time.NewTicker(stillTime)
	defer tick.Stop()
	before := cpuTimes(i.PID())
	for range stillLooks {
		select {
		case <-i.process.Done():
			return true
		case <-tick.C:
		}
		now := cpuTimes(i.PID())
		if now == before {
			return true
		}
		before = now
	}
	return false
}

// cpuTimes returns, as text, how long each of a Firecracker's threads that is a CPU of the guest
// has run; see the kernel's Documentation/scheduler/sched-stats.rst.
func cpuTimes(pid int) string {
	var all strings.Builder
	tasks, _ := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "task", "*"))
	for _, task := range tasks {
		name, err := os.ReadFile(filepath.Join(task, "comm"))
		if err != nil || !strings.HasPrefix(string(name), "fc_vcpu") {
			continue
		}
		times, _ := os.ReadFile(filepath.Join(task, "schedstat"))
		ran, _, _ := strings.Cut(string(times), " ")
		_, _ = fmt.Fprintln(&all, filepath.Base(task), ran)
	}
	return all.String()
}
