// Package guest is the agent: what runs inside a VM. As the first process of an
// initramfs it brings the guest up, takes the identity that the host gives it, and
// serves SSH until the VM ends. See package wire for how host and guest talk.
package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// The first arguments of the agent's program, which say what it is to be.
const (
	sftpCommand  = "sftp-server" // an SFTP server for a user other than root
	serveCommand = "serve"       // the agent beside an init of the image's own
	// workspaceCommand is one operation of a workspace; see workspaceMain.
	workspaceCommand = "workspace"
	launchCommand    = "launch" // a program that becomes a command; see launch
)

// servePort is the number that the guest channel has in the agent beside an init.
const servePort = 3

// Main runs the agent's program and returns its exit status.
func Main(version string, args []string) int {
	switch {
	case len(args) > 1 && args[1] == sftpCommand:
		return sftpMain()
	case len(args) > 1 && args[1] == wire.NoopArgument:
		return 0
	case len(args) > 4 && args[1] == launchCommand:
		return launchMain(args[2], args[3], args[4:])
	case len(args) > 2 && args[1] == workspaceCommand:
		return workspaceMain(args[2], args[3:])
	case len(args) > 1 && args[1] == serveCommand:
		a := &agent{version: version, first: true, reaper: newReaper(false), log: openLog()}
		a.shutdown, a.takeOn = shutdownBesideInit, a.become
		return a.report(a.serveBeside(args[2:]))
	case os.Getpid() == 1:
		limitCollections()
		a := &agent{version: version, first: true, reaper: newReaper(true)}
		a.shutdown, a.takeOn = a.powerOff, a.become
		return a.report(a.init())
	}
	fmt.Fprintln(os.Stderr, "smolvm-agent "+version+": runs as the first process of a smolvm guest, not here")
	return 2
}

// memoryLimit is how much of the guest's memory the agent may come to use before it
// collects garbage: 16 MB, of which it uses 3 when nothing happens.
const memoryLimit = 16 << 20

// limitCollections keeps the first hello and the first command from paying for a
// collection, whose code costs an emulated CPU more than the memory is worth.
func limitCollections() {
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(memoryLimit)
}

func sftpMain() int {
	stdio := struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout}
	server, err := sftp.NewServer(stdio)
	if err == nil {
		err = server.Serve()
	}
	if err != nil && err != io.EOF { //nolint:errorlint // returned as it is
		fmt.Fprintln(os.Stderr, "sftp:", err)
		return 1
	}
	return 0
}

// agent is the running agent.
type agent struct {
	version  string
	reaper   *reaper
	log      *os.File // the kernel's log, which goes to the console
	server   *Server
	timeline []wire.Step
	loadLate func() error // waits until the late modules are loaded
	// mounts are the directories of the host.
	mounts hostMounts
	// demanded are the modules that something in the guest may ask for.
	demanded demandedModules
	// vsockModules are those that the guest channel needs if it is vsock, in order.
	vsockModules []wire.Module
	shutdown     func(wire.Shutdown)
	// takeOn makes the guest what a hello says, as become does.
	takeOn func(wire.Hello) (wire.Identity, []string, error)

	first     bool // no hello has been answered yet
	rehearsal rehearsal
	network   guestNetwork
	listening bool // on the guest's network; used by connect only
}

// report tells the console of an error that ends the agent. As that ends PID 1, the
// kernel panics and the VM with it.
func (a *agent) report(err error) int {
	if err == nil {
		return 0
	}
	a.say(err.Error())
	return 1
}

// say writes a line to the console; only what goes wrong is worth one.
func (a *agent) say(text string) {
	if a.log == nil {
		fmt.Fprintln(os.Stderr, "smolvm-agent: "+text)
		return
	}
	// <3> is the level of errors, which "quiet" does not hide.
	_, _ = a.log.WriteString("<3>smolvm-agent: " + strings.ReplaceAll(text, "\n", "; "))
}

func openLog() *os.File {
	log, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return nil
	}
	return log
}

// step notes that a step of the boot is done.
func (a *agent) step(name string) {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) == nil {
		a.timeline = append(a.timeline, wire.Step{Name: name, At: durationOf(now)})
	}
}

// init runs the agent as PID 1, to the end of the VM.
func (a *agent) init() error {
	if err := mountBasics(); err != nil {
		return err
	}
	a.log = openLog()
	a.step("agent started")
	if err := setTimerSlack(); err != nil {
		a.say(err.Error())
	}
	go a.warmUp()
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	options := parseCmdline(string(cmdline))
	events, err := openUevents()
	if err != nil {
		return err
	}
	_, overVsock := options[wire.VsockArg]
	if err := a.loadModules(overVsock); err != nil {
		return err
	}
	a.step("boot modules loaded")
	file, kind, err := a.openChannel(options, events)
	if err != nil {
		return err
	}
	a.step("channel open")
	// A root that can't be mounted is told to the host, which waits for an answer.
	rootErr := switchRoot(options, events)
	_ = events.Close()
	a.step("root mounted")
	go readAhead("/bin/sh")
	if rootErr == nil && options["init"] != "" {
		return a.handOver(options["init"], file, kind)
	}
	go a.watchSignals()
	return a.serveOn(file, kind, rootErr)
}

// openChannel opens the guest's end of the guest channel, of the kind that the kernel's
// arguments ask for.
func (a *agent) openChannel(options map[string]string, events *uevents) (file *os.File, kind string, err error) {
	text, overVsock := options[wire.VsockArg]
	if !overVsock {
		file, err = openPort(events)
		return file, kindPort, err
	}
	port, err := parsePort(text)
	if err != nil {
		return nil, "", err
	}
	var load []func() error
	for _, module := range a.vsockModules {
		load = append(load, func() error { return loadModule(module.Path) })
	}
	file, err = openVsock(port, load)
	return file, kindVsock, err
}

// serveOn serves the host at an open end of the guest channel.
func (a *agent) serveOn(file *os.File, kind string, fatal error) error {
	host, err := newEndpoint(file, kind)
	if err != nil {
		return err
	}
	return a.serve(host, fatal)
}

// handOver makes PID 1 the image's own init, and a child of it the agent.
func (a *agent) handOver(init string, file *os.File, kind string) error {
	// The other agent has no modules.
	if err := errors.Join(a.loadLate(), a.demanded.load("fuse"), a.demanded.load("overlay")); err != nil {
		a.say(err.Error())
	}
	_, _, err := a.reaper.start(func() (int, error) {
		return syscall.ForkExec("/proc/self/exe", []string{"smolvm-agent", serveCommand, kind}, &syscall.ProcAttr{
			Files: []uintptr{0, 1, 2, file.Fd()},
			Sys:   &syscall.SysProcAttr{Setsid: true},
		})
	})
	if err != nil {
		return fmt.Errorf("start the agent beside init: %w", err)
	}
	runtime.LockOSThread()
	resetTimerSlack()
	if err := syscall.Exec(init, []string{init}, []string{"PATH=" + defaultPath, "TERM=linux", "SYSTEMD_GETTY_AUTO=0"}); err != nil {
		return fmt.Errorf("run init %s: %w", init, err)
	}
	return nil
}

// serveBeside runs the agent beside another init, to the end of the guest channel. Its argument
// is the channel's kind.
func (a *agent) serveBeside(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("%s takes the kind of the guest channel", serveCommand)
	}
	if err := unix.SetNonblock(servePort, true); err != nil {
		return fmt.Errorf("guest channel: %w", err)
	}
	if err := setTimerSlack(); err != nil {
		a.say(err.Error())
	}
	a.step("agent started")
	a.loadLate = func() error { return nil }
	return a.serveOn(os.NewFile(servePort, "channel"), args[0], nil)
}

// parseCmdline splits the kernel's arguments. One without a value has the value "1".
func parseCmdline(line string) map[string]string {
	options := map[string]string{}
	for word := range strings.FieldsSeq(line) {
		name, value, found := strings.Cut(word, "=")
		if !found {
			value = "1"
		}
		options[name] = value
	}
	return options
}

// loadModules loads what the manifest lists: the boot modules now, the late ones
// while the rest goes on. Those of the guest channel that there is not are left out.
func (a *agent) loadModules(overVsock bool) error {
	a.loadLate = func() error { return nil }
	text, err := os.ReadFile(wire.ModulesManifest)
	if os.IsNotExist(err) {
		return nil // all that is needed is built into the kernel
	}
	var modules []wire.Module
	if err == nil {
		err = json.Unmarshal(text, &modules)
	}
	if err != nil {
		return fmt.Errorf("read list of modules: %w", err)
	}
	transport := "mmio"
	if entries, err := os.ReadDir("/sys/bus/pci/devices"); err == nil && len(entries) > 0 {
		transport = "pci"
	}
	var late []wire.Module
	for _, module := range modules {
		switch {
		case module.Transport != "" && module.Transport != transport:
		case module.Use == wire.UsePort && overVsock || module.Use == wire.UseVsock && !overVsock:
		case module.Use == wire.UseVsock:
			a.vsockModules = append(a.vsockModules, module)
		case module.Use == wire.UseLate:
			late = append(late, module)
		case module.Use == wire.UseDemand:
			if err := a.demanded.keep(module); err != nil {
				return err
			}
		default:
			if err := loadModule(module.Path); err != nil {
				return err
			}
		}
	}
	// Opened now, as the file system that holds them is about to go.
	files, err := openModules(late)
	if err != nil {
		return err
	}
	loaded := make(chan struct{})
	var firstErr error
	go func() {
		defer close(loaded)
		for _, file := range files {
			if err := insertModule(file); err != nil && firstErr == nil {
				firstErr = err
			}
		}
	}()
	a.loadLate = func() error {
		<-loaded
		return firstErr
	}
	return nil
}

func openModules(modules []wire.Module) ([]*os.File, error) {
	files := make([]*os.File, 0, len(modules))
	for _, module := range modules {
		file, err := os.Open(module.Path)
		if err != nil {
			return files, err
		}
		files = append(files, file)
	}
	return files, nil
}

func loadModule(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return insertModule(file)
}

// insertModule loads a module and closes its file.
func insertModule(file *os.File) error {
	defer func() { _ = file.Close() }()
	err := unix.FinitModule(int(file.Fd()), "", 0)
	if err != nil && err != unix.EEXIST {
		return fmt.Errorf("load module %s: %w", file.Name(), err)
	}
	return nil
}
