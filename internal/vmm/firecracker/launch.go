package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/cgroup"
	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/confine"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/api"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/jail"
	"github.com/smolvm/smolvm/internal/vmm/tap"
)

// What Firecracker may take beside the guest's memory. It needs some 5 MB itself; the rest is
// the page cache of disks and of what a guest is saved to, and room.
const (
	overheadMiB = 256
	spareTasks  = 32 // threads beside those of the guest's CPUs, of which there are two or three
)

// launch starts Firecracker with its directory and its two logs.
func (b *Backend) launch(ctx context.Context, binary string, cfg vmm.Config, site cgroup.Site) (_ *instance, err error) {
	i := &instance{cfg: cfg, done: make(chan struct{}), running: make(chan struct{}, 1), ending: newEnding()}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.release())
		}
	}()
	files, err := filesOf(cfg)
	if err == nil && cfg.Restore != nil {
		err = checkMemory(cfg)
	}
	if err != nil {
		return nil, err
	}
	if i.dir, err = newRunDir(binary, b.opts.Jailer, cfg, files); err != nil {
		return nil, err
	}
	var logEnd *os.File
	if i.console, i.consoleEnd, err = ring.OpenPiped(cfg.ConsolePath, b.opts.ConsoleBytes); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = i.consoleEnd.Close()
		}
	}()
	if i.log, logEnd, err = openLog(cfg.LogPath, i.dir); err != nil {
		return nil, err
	}
	defer func() { _ = logEnd.Close() }()
	if i.metrics, err = openMetrics(i.dir); err != nil {
		return nil, err
	}

	cmd := exec.Command(binary, args(cfg, i.dir.jail != nil)...) //nolint:noctx // it outlives the call that starts it
	if cmd.Dir, err = i.dir.path(); err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = i.consoleEnd, logEnd
	i.limits, err = confine.New(site, confine.Bounds{
		ID: cfg.ID, GuestMiB: cfg.MemoryMiB, OverheadMiB: overheadMiB, Tasks: cfg.VCPUs + spareTasks, CPUs: cfg.CPULimit,
	})
	if err != nil {
		return nil, err
	}
	start, err := b.starter(ctx, i.dir.jail, cfg.NIC)
	if err != nil {
		return nil, err
	}
	i.process, err = confine.Start(i.limits, cmd, start)
	if err != nil {
		if i.process != nil {
			err = errors.Join(err, i.process.Kill())
		}
		return nil, explainStart(binary, err)
	}
	i.api = api.New(func(ctx context.Context) (net.Conn, error) { return i.dir.dial(ctx, nameAPI) })
	i.console.Start(i.ending)
	i.log.Start(nil)
	go i.metrics.read()
	go i.watch(site)
	return i, nil
}

// args is Firecracker's command line, of which a jailer adds a part.
func args(cfg vmm.Config, jailed bool) []string {
	all := []string{"--api-sock", nameAPI, "--log-path", nameLog, "--level", "Info", "--metrics-path", nameMetrics}
	if !jailed {
		all = append([]string{"--id", identifier(cfg.ID)}, all...)
	}
	return all
}

// identifier returns what of a VM's id Firecracker takes for one: letters, digits and hyphens.
func identifier(id string) string {
	const most = 64
	clean := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, "smolvm-"+id)
	return clean[:min(len(clean), most)]
}

// openLog opens Firecracker's log, with a named pipe that Firecracker opens by itself. The file
// that it returns is the same pipe, for what Firecracker prints without its logger.
func openLog(path string, dir *runDir) (_ *ring.Piped, theirs *os.File, err error) {
	log, err := ring.Open(path, ring.LogBytes)
	if err != nil {
		return nil, nil, err
	}
	var ours *os.File
	err = dir.within(func(path string) error {
		ours, theirs, err = openPipe(filepath.Join(path, nameLog))
		return err
	})
	if err == nil {
		if err = dir.own(nameLog); err != nil {
			err = errors.Join(err, ours.Close(), theirs.Close())
		}
	}
	if err != nil {
		return nil, nil, errors.Join(err, log.Close())
	}
	return ring.NewPiped(log, ours), theirs, nil
}

// openPipe makes a named pipe, and opens both its ends.
func openPipe(path string) (reads, writes *os.File, err error) {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, nil, &fs.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	// Without a writer it can only be opened this way; see fifo(7).
	if reads, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return nil, nil, err
	}
	if writes, err = os.OpenFile(path, os.O_WRONLY, 0); err != nil {
		return nil, nil, errors.Join(err, reads.Close())
	}
	return reads, writes, nil
}

// starter returns what starts Firecracker where the VM's network interface is.
func (b *Backend) starter(ctx context.Context, cell *jail.Jail, nic *vmm.NIC) (func(*exec.Cmd, func(func() error) error) (process, error), error) {
	switch {
	case cell != nil && nic != nil && nic.TAP != "":
		// Firecracker opens it as another user, without a capability.
		if err := tap.SetOwner(nic.TAP, cell.User()); err != nil {
			return nil, err
		}
		return func(cmd *exec.Cmd, within func(func() error) error) (process, error) {
			return inThisNetwork(within, func(within func(func() error) error) (process, error) {
				p, err := cell.Start(ctx, cmd, within, b.opts.Launcher, nil)
				if err != nil {
					return nil, err
				}
				return p, nil
			})
		}, nil
	case cell != nil:
		return func(cmd *exec.Cmd, within func(func() error) error) (process, error) {
			p, err := cell.Start(ctx, cmd, within, b.opts.Launcher, networkOf(nic))
			if err != nil {
				return nil, err
			}
			return p, nil
		}, nil
	case nic == nil:
		return plain, nil
	case nic.Link != nil:
		return func(cmd *exec.Cmd, within func(func() error) error) (process, error) {
			return b.onLink(ctx, cmd, within, *nic)
		}, nil
	}
	// Firecracker opens it by its name. What is wrong with it is told in better words here.
	file, err := tap.Open(nic.TAP)
	if err != nil {
		return nil, err
	}
	return func(cmd *exec.Cmd, within func(func() error) error) (process, error) {
		return inThisNetwork(within, func(within func(func() error) error) (process, error) { return plain(cmd, within) })
	}, file.Close()
}

// onLink starts a command in a network namespace of its own, in which a TAP interface is the
// other end of a link.
func (b *Backend) onLink(ctx context.Context, cmd *exec.Cmd, within func(func() error) error, nic vmm.NIC) (process, error) {
	p, err := namespace.Start(ctx, cmd, within, namespace.Options{
		Program: b.opts.Launcher, Network: networkOf(&nic),
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// networkOf is the network of a Firecracker whose VM's network interface is a link; nil: none.
func networkOf(nic *vmm.NIC) *namespace.Network {
	if nic == nil {
		return nil
	}
	return &namespace.Network{Link: nic.Link, MTU: nic.MTU}
}

func plain(cmd *exec.Cmd, within func(func() error) error) (process, error) {
	child, err := proc.StartIn(cmd, within)
	if err != nil {
		return nil, err
	}
	return child, nil
}

// inThisNetwork has start fork in the network namespace of the calling thread, which may be
// another than that of the thread that forks.
func inThisNetwork(within func(func() error) error, start func(within func(func() error) error) (process, error)) (process, error) {
	const here = "/proc/thread-self/ns/net"
	namespace, err := os.Open(here)
	if err != nil {
		return nil, err
	}
	defer func() { _ = namespace.Close() }()
	want, err := namespace.Stat()
	if err != nil {
		return nil, err
	}
	return start(func(fork func() error) error {
		if is, err := os.Stat(here); err != nil || !os.SameFile(is, want) {
			if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter the network namespace: %w", err)
			}
		}
		return within(fork)
	})
}

// slowConsole has a guest that floods its console wait, and lets go of Firecracker's end.
// Firecracker makes its standard output fail when that is full; it drops what could not be
// written then, and the interrupt that the guest's UART waits for.
func (i *instance) slowConsole() error {
	err := unix.SetNonblock(int(i.consoleEnd.Fd()), false)
	if err != nil {
		err = fmt.Errorf("have the console wait: %w", err)
	}
	return errors.Join(err, i.consoleEnd.Close())
}

// awaitAPI returns when Firecracker takes requests.
func (i *instance) awaitAPI(ctx context.Context) error {
	var made <-chan struct{}
	var stop func()
	err := i.dir.within(func(path string) (err error) {
		made, stop, err = watchDir(path)
		return err
	})
	if err != nil {
		return err
	}
	defer stop()
	for wait := time.Millisecond; ; {
		conn, err := i.dir.dial(ctx, nameAPI)
		if err == nil {
			return conn.Close()
		}
		// The socket has its name a moment before it is listened on, which nothing tells.
		var soon <-chan time.Time
		if errors.Is(err, syscall.ECONNREFUSED) {
			soon = time.After(wait)
			wait *= 2
		} else if !errors.Is(err, fs.ErrNotExist) && ctx.Err() == nil {
			return fmt.Errorf("connect to Firecracker: %w", err)
		}
		select {
		case <-soon:
		case <-made:
		case <-i.process.Done():
			return errEnded
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// watchDir returns a channel that receives when something is made in a directory, until stop
// is called.
func watchDir(path string) (made <-chan struct{}, stop func(), err error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, nil, os.NewSyscallError("inotify_init1", err)
	}
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_CREATE); err != nil {
		return nil, nil, errors.Join(os.NewSyscallError("inotify_add_watch", err), unix.Close(fd))
	}
	file := os.NewFile(uintptr(fd), "inotify")
	events, ended := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(ended)
		buffer := make([]byte, unix.SizeofInotifyEvent+unix.NAME_MAX+1)
		for {
			if _, err := file.Read(buffer); err != nil {
				return
			}
			select {
			case events <- struct{}{}:
			default:
			}
		}
	}()
	return events, func() {
		_ = file.Close()
		<-ended
	}, nil
}
