package shim_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/vmm"
)

// How the fake VM behaves: words of its boot arguments.
const (
	hasAgent  = "agent"   // an agent answers, and shuts down when asked
	deafAgent = "deaf"    // it agrees to shut down, and does not
	hasButton = "button"  // the power button works
	dies      = "dies"    // the VMM ends at once
	missing   = "missing" // the VMM is not installed
	stuck     = "stuck"   // the VMM carries out no command
	floods    = "floods"  // the agent keeps its channel busy and reads nothing
	busy      = "busy"    // the guest computes for ever
)

// consoleText is what each fake guest prints.
const consoleText = "hello from the console"

// fakeBackend runs no VM, but a process that behaves like a VMM with a guest in it.
type fakeBackend struct{}

func (fakeBackend) Name() string { return "fake" }

func (fakeBackend) Start(_ context.Context, cfg vmm.Config) (vmm.Instance, error) {
	words := strings.Fields(cfg.BootArgs)
	if slices.Contains(words, missing) {
		return nil, fmt.Errorf("start fake: %w", &smolvm.PrerequisiteError{
			Backend:  "fake",
			Findings: []smolvm.Finding{{Name: "fake", Severity: smolvm.SeverityError, Problem: "not found"}},
		})
	}
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(ends[0]), "channel"), os.NewFile(uintptr(ends[1]), "channel")
	defer func() { _, _ = ours.Close(), theirs.Close() }()
	channel, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	console, err := os.OpenFile(cfg.ConsolePath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = console.Close() }()
	cmd := exec.Command("/proc/self/exe", append([]string{vmmRole, cfg.ConsolePath}, words...)...)
	cmd.Stdout = console
	cmd.ExtraFiles = []*os.File{theirs}
	i := &fakeInstance{channel: channel, console: cfg.ConsolePath, done: make(chan struct{})}
	if info, err := console.Stat(); err == nil {
		i.earlier = int(info.Size())
	}
	if i.child, err = proc.Start(cmd); err != nil {
		return nil, err
	}
	go func() {
		<-i.child.Done()
		i.exit = vmm.Exit{Reason: vmm.ExitCrashed, Detail: i.child.Exit(), At: time.Now()}
		switch {
		case i.killed.Load():
			i.exit.Reason = vmm.ExitKilled
		case i.child.Success():
			i.exit.Reason = vmm.ExitPowerOff
		}
		close(i.done)
	}()
	if slices.Contains(words, stuck) {
		return stuckInstance{i}, nil
	}
	return i, nil
}

// stuckInstance is a VMM that hangs: a command returns when the VMM has ended.
type stuckInstance struct{ *fakeInstance }

func (i stuckInstance) Pause(context.Context) error    { return i.hang() }
func (i stuckInstance) Resume(context.Context) error   { return i.hang() }
func (i stuckInstance) Shutdown(context.Context) error { return i.hang() }

func (i stuckInstance) hang() error {
	<-i.Done()
	return errors.New("the VMM has ended")
}

type fakeInstance struct {
	child   *proc.Child
	channel net.Conn
	console string
	earlier int // bytes of earlier runs in it
	killed  atomic.Bool
	exit    vmm.Exit
	done    chan struct{}
}

func (i *fakeInstance) PID() int              { return i.child.PID() }
func (i *fakeInstance) Done() <-chan struct{} { return i.done }
func (i *fakeInstance) Exit() vmm.Exit        { return i.exit }

func (i *fakeInstance) OpenChannel(context.Context) (vmm.Channel, error) { return i.channel, nil }

func (i *fakeInstance) ConsoleTail(int) string {
	text, _ := os.ReadFile(i.console)
	return string(text[min(i.earlier, len(text)):])
}

func (i *fakeInstance) Shutdown(context.Context) error { return i.child.Signal(syscall.SIGUSR1) }

func (i *fakeInstance) Kill(context.Context) error {
	i.killed.Store(true)
	err := i.child.Kill()
	<-i.done
	return err
}

// vmmMain is the process of a fake VM.
func vmmMain(args []string) error {
	words := args[1:]
	button := make(chan os.Signal, 1)
	signal.Notify(button, syscall.SIGUSR1)
	fmt.Println(consoleText)
	if slices.Contains(words, dies) {
		return errors.New("as it was told")
	}
	off := make(chan struct{})
	if slices.Contains(words, busy) {
		go func() {
			for {
				_ = sha256.Sum256(nil)
			}
		}()
	}
	if slices.Contains(words, hasAgent) || slices.Contains(words, deafAgent) || slices.Contains(words, floods) {
		channel, err := net.FileConn(os.NewFile(3, "channel"))
		if err != nil {
			return err
		}
		go func() {
			serve := serveAgent
			if slices.Contains(words, floods) {
				serve = flood
			}
			if err := serve(channel, off); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}()
	}
	for {
		select {
		case <-button:
			if slices.Contains(words, hasButton) {
				return nil
			}
		case <-off:
			if !slices.Contains(words, deafAgent) {
				return nil
			}
			off = nil
		}
	}
}

// serveAgent is an agent that echoes what comes instead of SSH.
func serveAgent(channel net.Conn, off chan<- struct{}) error {
	var hello wire.Hello
	if err := wire.Read(channel, &hello); err != nil {
		return err
	}
	answer := wire.Answer{Version: "fake", Kernel: hello.Hostname}
	if hello.Time.IsZero() || len(hello.Seed) < 32 {
		answer.Error = "time or seed is missing"
	}
	if err := wire.Write(channel, answer); err != nil {
		return err
	}
	return serveStreams(channel, off)
}

// flood is an agent that, once the handshake is over, asks for more answers than the channel
// holds, and takes none.
func flood(channel net.Conn, _ chan<- struct{}) error {
	var hello wire.Hello
	if err := wire.Read(channel, &hello); err != nil {
		return err
	}
	if err := wire.Write(channel, wire.Answer{Version: "fake"}); err != nil {
		return err
	}
	ping := make([]byte, 12) // version 0; see yamux's spec.md
	ping[1], ping[3] = 2, 1  // a ping, that is to be answered
	for range 20_000 {       // more than a socket's buffer holds
		if _, err := channel.Write(ping); err != nil {
			return err
		}
	}
	return nil
}

func serveStreams(channel net.Conn, off chan<- struct{}) error {
	session, err := yamux.Server(channel, wire.MuxConfig())
	if err != nil {
		return err
	}
	for {
		stream, err := session.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer func() { _ = stream.Close() }()
			reader := bufio.NewReader(stream)
			first, err := reader.Peek(len(wire.Magic))
			if err != nil || string(first) != wire.Magic {
				_, _ = io.Copy(stream, reader)
				return
			}
			var control wire.Control
			if wire.Read(reader, &control) == nil {
				_ = wire.Write(stream, wire.ControlAnswer{})
			}
			if control.Shutdown != nil {
				off <- struct{}{}
			}
		}()
	}
}
