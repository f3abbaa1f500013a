package firecrackerfake

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/smolvm/smolvm/internal/stream"
)

// Command is the argument by which a test's program becomes a fake Firecracker; see [Main].
const Command = "fake-firecracker"

// Behaviour is how the fake program behaves, beside its API.
type Behaviour struct {
	Version string `json:"version,omitempty"`
	Call    string `json:"call,omitempty"`
	Fault   Fault  `json:"fault,omitempty"`
	// Deaf is how many connections the guest refuses before it listens.
	Deaf int `json:"deaf,omitempty"`
	// Silent has it never make the socket of its API.
	Silent bool `json:"silent,omitempty"`
	// Mute has it never write its metrics.
	Mute bool `json:"mute,omitempty"`
	// Requests is a file to which each request is appended, as a line "CALL BODY", and
	// "vsock connection" for each that the guest takes.
	Requests string `json:"requests,omitempty"`
}

// Program writes a program to a file that starts this process's own as a fake Firecracker.
func Program(path string, b Behaviour) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	script := fmt.Sprintf("#!/bin/sh\nexec %s %s %s \"$@\"\n", quote(self), Command, quote(string(text)))
	return os.WriteFile(path, []byte(script), 0o700)
}

func quote(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

// Metrics is the line that the fake program writes each time that it is to: what the guest has
// done since the last one.
const Metrics = `{"utc_timestamp_ms": 1, "block": {"read_bytes": 4096, "read_count": 2, "write_bytes": 512, "write_count": 1}, "block_drive0": {"read_bytes": 4096}}`

// Main is the fake program. Its arguments are a [Behaviour] and those of Firecracker. Its
// guest listens on vsock when it runs, and obeys what it is told there, a line each: "halt",
// "reboot", "panic", "triple fault" and "crash" end it, "print WORDS" prints to the console, anything else is
// sent back.
func Main(args []string) int {
	var b Behaviour
	if err := json.Unmarshal([]byte(args[0]), &b); err != nil {
		return fail(err)
	}
	options := map[string]string{}
	for i := 1; i+1 < len(args); i += 2 {
		options[args[i]] = args[i+1]
	}
	log, err := os.OpenFile(options["--log-path"], os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	_, _ = fmt.Fprintln(log, "fake Firecracker", options["--id"])
	metrics, err := os.OpenFile(options["--metrics-path"], os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	if b.Silent {
		// The runtime ends a program in which nothing can ever go on, but for a signal.
		terminated := make(chan os.Signal, 1)
		signal.Notify(terminated, syscall.SIGTERM)
		<-terminated
		return 0
	}
	g := &guest{log: log, deaf: b.Deaf, ends: make(chan int)}
	server := New(Options{
		Version: b.Version, Call: b.Call, Fault: b.Fault, Start: g.start, Record: b.Requests,
		Flush: func() error {
			if b.Mute {
				return nil
			}
			_, err := fmt.Fprintln(metrics, Metrics)
			return err
		},
		Die: func() {
			_, _ = fmt.Fprintln(log, "the fake dies")
			g.end(1)
		},
	})
	g.paused, g.record = server.isPaused, server.record
	listener, err := stream.ListenUnix(options["--api-sock"])
	if err != nil {
		return fail(err)
	}
	go server.Serve(listener)
	return <-g.ends
}

func fail(err error) int {
	_, _ = fmt.Fprintln(os.Stderr, err)
	const badArguments = 153
	return badArguments
}

// guest is what stands for the guest.
type guest struct {
	log    io.Writer
	paused func() bool
	record func(line string)
	ends   chan int // receives the exit status

	mu   sync.Mutex // guards the following
	deaf int
}

// end ends the program, and does not return.
func (g *guest) end(status int) {
	g.ends <- status
	select {}
}

// say prints to the console.
func say(line string) { _, _ = fmt.Fprintln(os.Stdout, line) }

func (g *guest) start(from *Saved) error {
	listener, err := stream.ListenUnix("vsock.sock")
	if err != nil {
		return fmt.Errorf("Cannot bind the vsock: %w", err) //nolint:staticcheck // as Firecracker
	}
	if from == nil {
		say("[    0.000000] Linux version of a fake")
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go g.serve(conn)
		}
	}()
	return nil
}

func (g *guest) listens() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.deaf--
	return g.deaf < 0
}

func (g *guest) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	lines := bufio.NewScanner(conn)
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), "CONNECT 1024") || !g.listens() {
		return
	}
	g.record("vsock connection")
	_, _ = fmt.Fprintln(conn, "OK 1073741824")
	for lines.Scan() {
		for g.paused() {
			<-time.After(time.Millisecond)
		}
		line := lines.Text()
		words, isText := strings.CutPrefix(line, "print ")
		switch {
		case isText:
			say(words)
		case line == "halt":
			say("[    1.000000] reboot: System halted\r")
			continue // and runs on, as Firecracker does
		case line == "reboot":
			say("[    1.000000] reboot: Restarting system\r")
			g.end(0)
		case line == "panic":
			say("[    1.000000] Kernel panic - not syncing: told so\r")
			g.end(0)
		case line == "triple fault", line == "triple fault of later releases":
			_, _ = fmt.Fprintln(g.log, "[fake:fc_vcpu 0] Received KVM_EXIT_SHUTDOWN signal")
			status := 0
			if line != "triple fault" {
				status = 1 // they don't take it for a success
			}
			g.end(status)
		case line == "crash":
			_, _ = fmt.Fprintln(g.log, "out of paper")
			const badSyscall = 148
			g.end(badSyscall)
		}
		_, _ = fmt.Fprintln(conn, line)
	}
}
