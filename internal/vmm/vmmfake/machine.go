package vmmfake

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/smolvm/smolvm/internal/vmm"
)

// Files that the process inherits, in the order of [task].
const (
	controlFD = 3
	consoleFD = 4
	firstFD   = 5
)

// machine is the VMM's process: devices, a guest, and what the shim can ask of both.
type machine struct {
	task
	console io.Writer
	channel net.Conn // nil: none
	hosts   *hosts   // that connect to the guest, in place of a channel; nil: none do
	link    net.Conn // nil: none
	drives  []*drive
	guest   *guest
	began   time.Time

	cpu cpu

	mu      sync.Mutex // guards the following
	control *os.File
	cancel  context.CancelCauseFunc // of the saving under way; nil: none
	off     bool                    // the end was told
}

// cpu is held by whoever keeps the guest from running. Each step of the guest that others
// can see passes it.
type cpu struct {
	steps sync.RWMutex

	mu      sync.Mutex // guards the following
	paused  bool
	since   time.Time
	stopped time.Duration // how long it was held in all
}

// step returns when the guest may go on.
func (c *cpu) step() {
	c.steps.RLock()
	defer c.steps.RUnlock()
}

// pause holds the guest, and reports whether it was held before.
func (c *cpu) pause() (before bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.paused {
		return true
	}
	c.steps.Lock()
	c.paused, c.since = true, time.Now()
	return false
}

func (c *cpu) resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.paused {
		return
	}
	c.stopped += time.Since(c.since)
	c.paused = false
	c.steps.Unlock()
}

// time is how long the guest has run since began.
func (c *cpu) time(began time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if c.paused {
		now = c.since
	}
	return now.Sub(began) - c.stopped
}

// gated is a connection of the guest's: nothing goes through while it is held.
type gated struct {
	net.Conn
	cpu *cpu
}

func (g gated) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	g.cpu.step()
	return n, err
}

func (g gated) Write(p []byte) (int, error) {
	g.cpu.step()
	return g.Conn.Write(p)
}

// Main is the VMM's process, for a test's program whose first argument is [Command]. It
// returns the exit status.
func Main(args []string) int {
	var t task
	if len(args) == 0 {
		return 2
	}
	if err := json.Unmarshal([]byte(args[len(args)-1]), &t); err != nil {
		fmt.Fprintln(os.Stderr, "read orders:", err)
		return 2
	}
	fmt.Fprintln(os.Stderr, run(t))
	return 1
}

// run returns only if it fails: otherwise the process ends with the VM.
func run(t task) error {
	if t.has(Dies) {
		return errors.New("as it was told")
	}
	m := &machine{
		task: t, began: time.Now(),
		control: os.NewFile(controlFD, "control"), console: os.NewFile(consoleFD, "console"),
	}
	// SIGTERM is another way to ask for the end.
	quit := make(chan os.Signal, 1)
	signal.Notify(quit, syscall.SIGTERM)
	go func() {
		<-quit
		m.quit()
	}()
	if t.has(Stuck) {
		m.tell(message{Event: eventRunning})
		if err := m.open(); err != nil {
			return err
		}
		m.guest.start()
		select {}
	}
	if err := m.open(); err != nil {
		return err
	}
	m.tell(message{Event: eventRunning})
	if t.has(Busy) {
		go func() {
			for {
				_ = sha256.Sum256(nil)
			}
		}()
	}
	m.guest.start()
	return m.serve()
}

// open opens the devices, and puts the guest in its first state: that of a boot, or the one
// that was saved.
func (m *machine) open() error {
	next := uintptr(firstFD)
	inherit := func(name string) (net.Conn, error) {
		file := os.NewFile(next, name)
		next++
		defer func() { _ = file.Close() }()
		return net.FileConn(file)
	}
	var err error
	switch {
	case m.Channel && m.Resets:
		file := os.NewFile(next, "channel")
		next++
		if m.hosts, err = newHosts(file); err != nil {
			return err
		}
	case m.Channel:
		if m.channel, err = inherit("channel"); err != nil {
			return err
		}
	}
	if m.Link {
		if m.link, err = inherit("link"); err != nil {
			return err
		}
	}
	for n, config := range m.Config.Drives {
		d, err := openDrive(config)
		if err != nil {
			return err
		}
		d.halt = func(err error) { m.halted(n, err) }
		d.cpu = &m.cpu
		m.drives = append(m.drives, d)
	}
	m.guest, err = newGuest(m)
	return err
}

// tell sends a message to the shim.
func (m *machine) tell(what message) {
	text, err := json.Marshal(what)
	if err != nil {
		panic(err) // there is nothing in it that can't be encoded
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_, _ = m.control.Write(append(text, '\n')) // to a shim that is gone, with which we end
}

// serve does what the shim asks, in turn, but for what ends a request.
func (m *machine) serve() error {
	requests := make(chan request, 16)
	go func() {
		for r := range requests {
			answer, err := m.obey(r)
			answer.ID = r.ID
			if err != nil {
				answer.Error = err.Error()
			}
			m.tell(answer)
		}
	}()
	lines := bufio.NewScanner(m.control)
	for lines.Scan() {
		var r request
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return err
		}
		switch r.Op {
		case opQuit:
			m.quit()
		case opCancel:
			m.mu.Lock()
			if m.cancel != nil {
				m.cancel(context.Canceled)
			}
			m.mu.Unlock()
		default:
			requests <- r
		}
	}
	return errors.New("the shim is gone")
}

func (m *machine) obey(r request) (answer message, err error) {
	switch r.Op {
	case opPause:
		m.cpu.pause()
	case opResume:
		m.cpu.resume()
	case opButton:
		if m.has(Button) {
			go m.guest.powerOff("")
		}
	case opSave:
		ctx, cancel := context.WithCancelCause(context.Background())
		m.mu.Lock()
		m.cancel = cancel
		m.mu.Unlock()
		answer.Held, err = m.save(ctx, r.Memory, r.State)
		m.mu.Lock()
		m.cancel = nil
		m.mu.Unlock()
		cancel(nil)
	case opCheck:
		err = checkOverlay(r.Overlay)
	case opSwitch:
		if r.Drive >= len(m.drives) {
			return answer, fmt.Errorf("there is no drive %d", r.Drive)
		}
		err = m.drives[r.Drive].overlay(r.Overlay)
	default:
		err = fmt.Errorf("unknown operation %q", r.Op)
	}
	return answer, err
}

// halted holds the guest for a drive that could not be used, and returns when it may try
// again.
func (m *machine) halted(drive int, err error) {
	m.cpu.pause()
	m.tell(message{Event: eventHalt, Halt: &vmm.Halt{Drive: drive, NoSpace: errors.Is(err, syscall.ENOSPC), Detail: err.Error()}})
	m.cpu.step()
}

// end tells why the VM ends, and ends it.
func (m *machine) end(reason vmm.ExitReason, detail string) {
	m.mu.Lock()
	first := !m.off
	m.off = true
	m.mu.Unlock()
	if first {
		m.tell(message{Event: eventEnd, Reason: reason, Detail: detail})
		os.Exit(0) //nolint:forbidigo // it is the VMM's process that ends
	}
	select {} // another goroutine is at it
}

// quit ends the VMM at once. What the guest has not synced is lost.
func (m *machine) quit() { m.end(vmm.ExitKilled, "") }
