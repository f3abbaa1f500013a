// Package vmmfake is a VMM for tests of the engine: a real process that a shim starts,
// talks to, pauses, saves and kills as it does QEMU, with a guest in it that is a program
// of ours. A start takes some milliseconds and needs neither QEMU nor an image, so the
// engine's rules are tested in seconds, and under the race detector.
//
// What is real: the process and how it ends, the console's pipe, the guest channel and
// the agent's protocol on it (hello, yamux, SSH, copies, controls), the guest's
// network, overlays and their chains in qcow2 files, and that all which a guest has in
// memory is in what is saved of it. The guest's programs are a shell and the few commands
// in programs.go; its files are in memory, and on its first drive when they are synced.
//
// What it can't show: anything of QEMU, of a kernel, or of the agent in the guest; how
// much memory or time a VM takes; and what a program does that was running when its guest
// was saved, as programs are not part of what is saved.
//
// Only tests import it. The test's program must be able to be the VMM: see [Main].
package vmmfake

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// Faults are words, separated by commas, that make a VM behave badly. They are in the
// kernel's argument "vmmfake=", or in the file [FaultsFile] beside the console's log, where
// they are for a start only.
const (
	Missing    = "missing"     // the VMM is not installed
	Dies       = "dies"        // the VMM ends at once
	Stuck      = "stuck"       // the VMM carries out no command
	Silent     = "silent"      // the guest says nothing, ever
	NoAgent    = "no-agent"    // there is no agent in the guest
	Echo       = "echo"        // the agent echoes what should be SSH
	Deaf       = "deaf"        // the agent agrees to shut down, and does not
	Button     = "button"      // the guest listens to its power button
	Busy       = "busy"        // the guest computes for ever
	Floods     = "floods"      // the agent keeps its channel busy and reads nothing
	DiesSaving = "dies-saving" // the VMM ends in the middle of a saving
	// ResetsFirst has a restored guest reset the first connection, where its channel is of
	// that kind, when the host has begun to speak.
	ResetsFirst = "resets-first"
	// Unheard has a guest that goes on after a saving accept no connection any more, where its
	// channel is reset then.
	Unheard    = "unheard"
	SlowSaving = "slow-saving" // a saving takes a quarter of a second before it holds the guest
)

// FaultsFile is the name of the file with faults, in the directory of the console's log.
const FaultsFile = "vmmfake-faults"

// Command is the first argument of a program that is to call [Main].
const Command = "vmmfake"

// Options of a [Backend].
type Options struct {
	// Name of the backend that it stands in for. Empty: "qemu".
	Name string
	// ResetsChannel has the channel be one that is connected to, and that is reset when the
	// guest is saved or restored, as Firecracker's is: in the guest, where it shows at once,
	// while the host's end shows it when the host next writes.
	ResetsChannel bool
	// ConsoleBytes is the limit of each console. Zero: [ring.ConsoleBytes].
	ConsoleBytes int64
	// RawOnly makes it a VMM that can use raw disks only, and can't switch disks.
	RawOnly bool
}

// Backend implements [vmm.Backend].
type Backend struct{ opts Options }

var _ vmm.Backend = (*Backend)(nil)

// New returns a Backend.
func New(opts Options) *Backend {
	if opts.Name == "" {
		opts.Name = "qemu"
	}
	if opts.ConsoleBytes == 0 {
		opts.ConsoleBytes = ring.ConsoleBytes
	}
	return &Backend{opts}
}

// Name implements [vmm.Backend].
func (b *Backend) Name() string { return b.opts.Name }

// Traits declares what it can do, which is what the backend does that it stands in for, unless
// it can use raw disks only.
func (b *Backend) Traits() vmm.Traits {
	declared := traits.QEMU()
	declared.Name = b.opts.Name
	if b.opts.RawOnly {
		declared.DiskFormats = []string{"raw"}
	}
	return declared
}

// Start implements [vmm.Backend].
func (b *Backend) Start(ctx context.Context, cfg vmm.Config) (vmm.Instance, error) {
	for _, drive := range cfg.Drives {
		if b.opts.RawOnly && (drive.Format != "raw" || len(drive.Backing) > 0) {
			return nil, fmt.Errorf("start the fake VMM for VM %q: its drive %s is %s", cfg.ID, drive.Path, drive.Format)
		}
	}
	program, err := findProgram(cfg)
	if err != nil {
		return nil, err
	}
	i, err := launch(program, cfg, b.opts)
	if err == nil {
		err = i.awaitRunning(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("start the fake VMM for VM %q: %w", cfg.ID, err)
	}
	switch {
	case slices.Contains(i.faults, Stuck):
		return &stuckInstance{i}, nil
	case b.opts.RawOnly:
		return i, nil
	}
	return &switchingInstance{i}, nil
}

// findProgram returns the program that is the VMM: this one, unless another is named.
func findProgram(cfg vmm.Config) (string, error) {
	name := cfg.Binary
	if name == "" {
		name = "/proc/self/exe"
	}
	path, err := exec.LookPath(name)
	if err == nil && slices.Contains(faultsOf(cfg), Missing) {
		err = exec.ErrNotFound
	}
	if err != nil {
		return "", &smolvm.PrerequisiteError{Backend: "fake", Findings: []smolvm.Finding{{
			Name: name, Severity: smolvm.SeverityError, Problem: "not found: " + err.Error(), Why: "runs the VMs",
		}}}
	}
	return path, nil
}

// faultsOf returns the faults that a VM is to have.
func faultsOf(cfg vmm.Config) []string {
	var faults []string
	for word := range strings.FieldsSeq(cfg.BootArgs) {
		if list, found := strings.CutPrefix(word, "vmmfake="); found {
			faults = append(faults, strings.Split(list, ",")...)
		}
	}
	text, err := os.ReadFile(filepath.Join(filepath.Dir(cfg.ConsolePath), FaultsFile))
	if err == nil {
		faults = append(faults, strings.FieldsFunc(string(text), func(r rune) bool { return r == ',' || r == '\n' })...)
	}
	return faults
}

// task is what the VMM's process is told.
type task struct {
	Config vmm.Config `json:"config"`
	Faults []string   `json:"faults"`
	// Channel and Link say which of the files there are that it inherits, in this order.
	Channel bool `json:"channel"`
	Link    bool `json:"link"`
	// Resets says that the channel is a listener's, and is reset; see [Options].
	Resets bool `json:"resets,omitempty"`
}

// launch starts the process with its connections and its two logs.
func launch(program string, cfg vmm.Config, opts Options) (_ *instance, err error) {
	i := &instance{
		cfg: cfg, resets: opts.ResetsChannel, diskLimit: cfg.DiskLimit, faults: faultsOf(cfg), done: make(chan struct{}), closed: make(chan struct{}),
		ready: make(chan struct{}), pending: map[int]chan message{}, running: make(chan struct{}, 1), halts: make(chan vmm.Halt, 1),
	}
	if err := checkNIC(cfg.NIC); err != nil {
		return nil, err
	}
	var theirs []*os.File
	defer func() {
		for _, file := range theirs {
			_ = file.Close()
		}
		if err != nil {
			err = errors.Join(err, i.closeFiles())
		}
	}()
	control, file, err := pair()
	if err != nil {
		return nil, err
	}
	i.control, theirs = control, append(theirs, file)
	if i.console, file, err = openLog(cfg.ConsolePath, opts.ConsoleBytes); err != nil {
		return nil, err
	}
	theirs = append(theirs, file)
	if i.log, file, err = openLog(cfg.LogPath, ring.LogBytes); err != nil {
		return nil, err
	}
	theirs = append(theirs, file)
	files := []*os.File{theirs[0], theirs[1]}
	if cfg.Channel {
		if i.resets {
			i.address, file, err = listen()
		} else {
			i.channel, file, err = pair()
		}
		if err != nil {
			return nil, err
		}
		theirs, files = append(theirs, file), append(files, file)
	}
	orders := task{Config: cfg, Faults: i.faults, Channel: cfg.Channel, Resets: i.resets}
	if cfg.NIC != nil {
		orders.Link, files = true, append(files, cfg.NIC.Link)
	}
	text, err := json.Marshal(orders)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, Command, "-name", cfg.ID, string(text)) //nolint:noctx // it outlives the call that starts it
	cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = files, theirs[2], theirs[2]
	if i.child, err = proc.Start(cmd); err != nil {
		return nil, err
	}
	i.console.pump()
	i.log.pump()
	go i.read()
	go i.watch()
	return i, nil
}

func checkNIC(nic *vmm.NIC) error {
	if nic == nil {
		return nil
	}
	if err := nic.Validate(); err != nil || nic.TAP == "" {
		return err
	}
	return fmt.Errorf("use TAP interface %s: %w by the fake VMM", nic.TAP, smolvm.ErrUnsupported)
}

// pair returns two connected stream sockets, one for us and one to be inherited.
func pair() (*net.UnixConn, *os.File, error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(ends[0]), "fake VMM"), os.NewFile(uintptr(ends[1]), "fake VMM")
	conn, err := net.FileConn(ours) // duplicates it
	_ = ours.Close()
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil //nolint:forcetypeassert // that is what we made
}

// bounded is a bounded log that the VMM writes to through a pipe.
type bounded struct {
	*ring.Log
	pipe        *os.File
	hurry, done chan struct{}
}

func openLog(path string, limit int64) (*bounded, *os.File, error) {
	log, err := ring.Open(path, limit)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, log.Close())
	}
	return &bounded{log, ours, make(chan struct{}), make(chan struct{})}, theirs, nil
}

func (b *bounded) pump() {
	go func() {
		b.Pump(b.pipe, b.hurry)
		close(b.done)
	}()
}

// drain writes what the VMM, which has ended, has left in the pipe.
func (b *bounded) drain() {
	close(b.hurry)
	<-b.done
}
