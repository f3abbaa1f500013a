// Package namespace starts a command in Linux namespaces of its own, with a network that is
// one TAP interface: for a VMM that can only use a TAP, and for whoever may not make one.
//
// The command is started through a launcher: this program once more, in another role (package
// launcher), inside the new namespaces. There it makes
//
//	tap0 --- bridge0 --- link0
//
// and executes the command, which opens tap0 by its name. The file of link0 it hands to this
// process, which pumps frames between it and a datagram socket, the link. So the command is on
// the very network that a VMM is which takes the link itself. Without the right to make
// namespaces, they are in a user namespace, in which the caller's user is itself and no other.
//
// Two interfaces, not one: what the guest hands to its device are segments of up to 64 KiB
// whose checksums are not computed. The kernel cuts them up and sums them for an interface
// whose reader can't, which link0's is. A packet socket (packet(7)) on tap0 would see them as
// they are. A bridge, not redirection by tc(8): it is one module, which the kernel loads for
// an unprivileged user namespace too, and which all hosts with containers have; redirection
// takes three (ingress, a classifier and mirred), which some kernels lack. The bridge learns
// no addresses, so a guest can't fill its table, and has no netfilter hooks.
//
// Nothing is left of the namespaces when the command has ended and the file of link0 is
// closed, whoever was killed in between.
package namespace

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/proc"
)

// TAP is the name of the interface that the command finds in its network namespace.
const TAP = "tap0"

// DefaultMTU is that of Ethernet, in bytes.
const DefaultMTU = 1500

// Options are the options of [Start]. The zero value gives the command no namespace.
type Options struct {
	// Program is the program that becomes the launcher, with its first arguments: it reads
	// its orders from its standard input, as package program does. Empty: this program, with
	// its own arguments, which is right in a shim.
	Program []string
	// Network gives the command a network namespace with a TAP interface.
	Network *Network
	// Mounts gives the command a mount namespace in which these are mounted, in this order. It
	// takes root.
	Mounts []Mount
	// Supervised makes the command the child of a process that is the first of a PID
	// namespace, and stays: the launcher. When the caller of [Start] dies, the kernel kills
	// that process, and with it all that is in the namespace. So the command may change its
	// user, which rids a process of its parent-death signal. It takes root.
	Supervised bool
	// Capabilities are those that the command keeps, by their numbers, if this process has
	// them; see capabilities(7). All others are gone, also from what it could ever get.
	Capabilities []uintptr
}

// Network is a network namespace with the TAP interface [TAP], of one queue.
type Network struct {
	// Link is one of a pair of connected unix datagram sockets, each datagram an Ethernet
	// frame. It is duplicated: the caller may close its own.
	Link *os.File
	// MTU in bytes, without Ethernet's header, of all that passes. Zero: [DefaultMTU].
	MTU int
	// Owner is the id of the user who may open the TAP. Nil: this process's.
	Owner *int
}

// Mount is what [Options.Mounts] mounts: a file or directory of the host somewhere else.
type Mount struct {
	// Source is what is mounted, and Target where: both are there. The two are absolute.
	Source string `json:"source"`
	Target string `json:"target"`
	// ReadOnly forbids to write to it.
	ReadOnly bool `json:"read_only,omitempty"`
	// Devices allows device files and programs in it, even where Source does not.
	Devices bool `json:"devices,omitempty"`
	// User, if it is not 0, is the id of the user and group whom the owner of Source appears
	// to be; what that user writes is the owner's on the disk. No inode changes. Not all file
	// systems can do it, nor kernels before 5.12.
	User int `json:"user,omitempty"`
}

// Process is a command that runs in namespaces of its own.
type Process struct {
	child      *proc.Child
	supervised *supervised // nil if the child is the command
	pump       *pump       // nil without a network
	done       chan struct{}
}

// Start starts a command in namespaces of its own, and returns when it is being executed.
// Nothing of it is left when it fails. Its Path is not looked up in PATH. If within is not nil
// it is as that of [proc.StartIn]. ctx bounds the call only.
//
// The command has no capability, can get none, and dies with this process. Hints of the
// errors say what a person can do.
func Start(ctx context.Context, cmd *exec.Cmd, within func(fork func() error) error, opts Options) (*Process, error) {
	if within == nil {
		within = func(fork func() error) error { return fork() }
	}
	p, err := start(ctx, cmd, within, opts)
	if err != nil {
		return nil, explain(err, cmd.Path, opts)
	}
	return p, nil
}

func start(ctx context.Context, cmd *exec.Cmd, within func(fork func() error) error, opts Options) (_ *Process, err error) {
	c, err := newCall(cmd, opts)
	if err != nil {
		return nil, err
	}
	defer c.close()
	child, err := proc.StartIn(c.launcher, within)
	if err != nil {
		return nil, &failure{Step: stepClone, Errno: errnoOf(err), Text: err.Error()}
	}
	c.closeTheirs()
	p := &Process{child: child, done: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, child.Kill())
			if p.pump != nil {
				p.pump.close()
			}
		}
	}()
	stop := context.AfterFunc(ctx, c.interrupt)
	defer stop()
	if err = p.await(c, opts); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	go p.finish()
	return p, nil
}

// await follows the launcher until it has executed the command.
func (p *Process) await(c *call, opts Options) error {
	ready, file, err := c.next()
	switch {
	case errors.Is(err, io.EOF):
		return errNoLauncher
	case err != nil:
		return err
	case !ready.Ready, (file != nil) != (opts.Network != nil):
		return errNoLauncher
	}
	if file != nil {
		if p.pump, err = newPump(file, opts.Network.Link, opts.Network.mtu()); err != nil {
			return err
		}
	}
	started, pidfd, err := c.next()
	switch {
	case opts.Supervised && err == nil && started.Started && pidfd != nil:
		if p.supervised, err = newSupervised(c.takeReports(), pidfd); err != nil {
			return err
		}
	case !opts.Supervised && errors.Is(err, io.EOF): // the socket was closed by the execution
	case err == nil || errors.Is(err, io.EOF):
		return errNoLauncher
	default:
		return err
	}
	if p.pump != nil {
		p.pump.run()
	}
	return nil
}

// finish waits for the end, and leaves nothing behind.
func (p *Process) finish() {
	<-p.child.Done()
	if p.pump != nil {
		p.pump.close()
	}
	if p.supervised != nil {
		p.supervised.finish()
	}
	close(p.done)
}

// PID returns the process id of the command, as this process sees it.
func (p *Process) PID() int {
	if p.supervised != nil && p.supervised.pid > 0 {
		return p.supervised.pid
	}
	return p.child.PID()
}

// Done returns a channel that is closed when the command has ended and nothing is left of it
// and its namespaces.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how the command ended, as [proc.Child.Exit] does. It may be called only after
// Done is closed.
func (p *Process) Exit() string {
	if p.supervised != nil && p.supervised.exit != "" {
		return p.supervised.exit
	}
	return p.child.Exit()
}

// Success reports whether the command ended by itself with status 0. It may be called only
// after Done is closed.
func (p *Process) Success() bool { return p.Exit() == "exit status 0" }

// Signal sends a signal to the command. One that has ended already is a success.
func (p *Process) Signal(sig os.Signal) error {
	number, ok := sig.(syscall.Signal)
	if p.supervised == nil || !ok {
		return p.child.Signal(sig)
	}
	return p.supervised.signal(number)
}

// Kill kills the command, and all that it has started if it is supervised, and waits until
// nothing is left.
func (p *Process) Kill() error {
	if err := p.child.Kill(); err != nil {
		return err
	}
	<-p.done
	return nil
}

func (n *Network) mtu() int {
	if n.MTU == 0 {
		return DefaultMTU
	}
	return n.MTU
}

// call is one launch: the launcher, and the two ends of what is talked over.
type call struct {
	launcher *exec.Cmd
	reports  *net.UnixConn

	once   sync.Once
	theirs []*os.File
}

// newCall returns a launcher that is ready to be started.
func newCall(cmd *exec.Cmd, opts Options) (_ *call, err error) {
	c := &call{}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	stdin, err := stdinOf(cmd)
	if err != nil {
		return nil, err
	}
	c.theirs = append(c.theirs, stdin)
	order := orderOf(cmd, opts)
	orders, err := writeOrders(order)
	if err != nil {
		return nil, err
	}
	c.theirs = append(c.theirs, orders)
	reports, err := c.openReports()
	if err != nil {
		return nil, err
	}
	program := opts.Program
	if len(program) == 0 {
		program = append([]string{ownProgram}, os.Args[1:]...)
	}
	launcher := exec.Command(program[0], program[1:]...) //nolint:noctx // it becomes the command, which outlives the call
	if program[0] == ownProgram {
		launcher.Args[0] = os.Args[0] // a program may be another one by another name
	}
	launcher.Dir, launcher.Env = cmd.Dir, cmd.Env
	launcher.Stdin, launcher.Stdout, launcher.Stderr = orders, cmd.Stdout, cmd.Stderr
	launcher.ExtraFiles = append(slices.Clip(cmd.ExtraFiles), reports, stdin)
	launcher.SysProcAttr = attributes(cmd.SysProcAttr, opts)
	c.launcher = launcher
	return c, nil
}

// ownProgram is this program, also if another file has its name by now.
const ownProgram = "/proc/self/exe"

// stdinOf returns what the command reads: a file, or nothing.
func stdinOf(cmd *exec.Cmd) (*os.File, error) {
	switch stdin := cmd.Stdin.(type) {
	case nil:
		return os.Open(os.DevNull)
	case *os.File:
		fd, err := unix.FcntlInt(stdin.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, os.NewSyscallError("fcntl", err)
		}
		return os.NewFile(uintptr(fd), stdin.Name()), nil
	default:
		return nil, fmt.Errorf("standard input of %s is a %T, not a file", cmd.Path, stdin)
	}
}

// writeOrders returns a file from which an order is read. It is in memory: a pipe could be too
// small to take it.
func writeOrders(o Order) (*os.File, error) {
	text, err := json.Marshal(Orders{Launch: &o})
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("orders", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	file := os.NewFile(uintptr(fd), "orders")
	if _, err := file.Write(append(text, '\n')); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// openReports makes the socket on which the launcher reports, and returns its end.
func (c *call) openReports() (*os.File, error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(ends[0]), "reports"), os.NewFile(uintptr(ends[1]), "reports")
	c.theirs = append(c.theirs, theirs)
	conn, err := net.FileConn(ours) // duplicates it
	_ = ours.Close()
	if err != nil {
		return nil, err
	}
	c.reports = conn.(*net.UnixConn) //nolint:forcetypeassert // a unix socket's
	return theirs, nil
}

// interrupt ends the wait for a report.
func (c *call) interrupt() { _ = c.reports.SetReadDeadline(past) }

// takeReports makes the reports the caller's to close.
func (c *call) takeReports() *net.UnixConn {
	conn := c.reports
	c.reports = nil
	_ = conn.SetReadDeadline(never)
	return conn
}

// closeTheirs closes what the launcher has inherited.
func (c *call) closeTheirs() {
	c.once.Do(func() {
		for _, file := range c.theirs {
			_ = file.Close()
		}
	})
}

func (c *call) close() {
	c.closeTheirs()
	if c.reports != nil {
		_ = c.reports.Close()
	}
}
