// Package qemu runs VMs by QEMU, controlled over QMP. All connections to QEMU are
// inherited pairs of sockets, so it makes no socket files and none can be stale.
package qemu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/cgroup"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/confine"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// Options of a [Backend]. The zero value is useful.
type Options struct {
	// Machine is QEMU's machine for every VM. Empty: chosen for each.
	Machine string
	// ConsoleBytes is the limit of each console. Zero: [ring.ConsoleBytes].
	ConsoleBytes int64
}

// Backend implements [vmm.Backend].
type Backend struct{ opts Options }

var _ vmm.Backend = (*Backend)(nil)

// New returns a Backend.
func New(opts Options) *Backend { return &Backend{opts: opts} }

// Name implements [vmm.Backend].
func (b *Backend) Name() string { return traits.QEMU().Name }

// Start implements [vmm.Backend].
func (b *Backend) Start(ctx context.Context, cfg vmm.Config) (vmm.Instance, error) {
	binary, err := findBinary(cfg.Binary)
	if err != nil {
		return nil, err
	}
	machine := b.opts.Machine
	if machine == "" {
		machine = machineFor(cfg, runtime.GOARCH)
	}
	inst, err := launch(binary, machine, cfg, cmp.Or(b.opts.ConsoleBytes, ring.ConsoleBytes), cgroup.Find("/"))
	if err != nil {
		return nil, fmt.Errorf("start QEMU for VM %q: %w", cfg.ID, err)
	}
	if err := inst.awaitRunning(ctx); err != nil {
		return nil, fmt.Errorf("start QEMU for VM %q: %w", cfg.ID, err)
	}
	return inst, nil
}

func findBinary(asked string) (string, error) {
	name := asked
	if name == "" {
		name = traits.QEMUProgram(runtime.GOARCH)
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", &smolvm.PrerequisiteError{Backend: "qemu", Findings: []smolvm.Finding{{
			Name:     name,
			Severity: smolvm.SeverityError,
			Problem:  "not found: " + err.Error(),
			Why:      "runs the VMs",
			Fix:      "smolvm doctor",
		}}}
	}
	return filepath.Abs(path)
}

// launch starts QEMU with its connections and its two logs.
func launch(binary, machine string, cfg vmm.Config, consoleBytes int64, site cgroup.Site) (_ *instance, err error) {
	inst := &instance{
		cfg: cfg, machine: machine, done: make(chan struct{}), running: make(chan struct{}, 1), findRAM: findRAM,
		disks: map[int]string{}, migration: make(chan string, maxStates), resumed: make(chan struct{}, 1),
		halts: make(chan vmm.Halt, 1),
	}
	var controlFile, consoleFile, logFile *os.File
	if inst.control, controlFile, err = pair(); err != nil {
		return nil, err
	}
	defer func() { _ = controlFile.Close() }()
	if inst.console, consoleFile, err = ring.OpenPiped(cfg.ConsolePath, consoleBytes); err != nil {
		return nil, errors.Join(err, inst.closeConns())
	}
	defer func() { _ = consoleFile.Close() }()
	if inst.log, logFile, err = ring.OpenPiped(cfg.LogPath, ring.LogBytes); err != nil {
		return nil, errors.Join(err, inst.closeConns())
	}
	defer func() { _ = logFile.Close() }()

	// Go gives the nth extra file the number 3+n.
	files, fd := []*os.File{controlFile, consoleFile}, fds{qmp: 3, console: 4}
	disks, err := openDisks(cfg.Drives)
	if err != nil {
		return nil, errors.Join(err, inst.closeConns())
	}
	defer closeDisks(disks)
	for _, chain := range disks {
		var numbers []int
		for n := range chain {
			numbers = append(numbers, 3+len(files)+n)
		}
		fd.disks, files = append(fd.disks, numbers), append(files, chain...)
	}
	inst.diskNames = diskNames(disks, fd.disks)
	if cfg.Channel {
		var file *os.File
		if inst.channel, file, err = pair(); err != nil {
			return nil, errors.Join(err, inst.closeConns())
		}
		defer func() { _ = file.Close() }()
		fd.channel, files = 3+len(files), append(files, file)
	}
	if cfg.NIC != nil {
		link, closeLink, err := openLink(*cfg.NIC)
		if err != nil {
			return nil, errors.Join(err, inst.closeConns())
		}
		defer closeLink()
		fd.link, files = 3+len(files), append(files, link)
	}
	if cfg.Restore != nil {
		state, err := openRestore(cfg)
		if err != nil {
			return nil, errors.Join(err, inst.closeConns())
		}
		defer func() { _ = state.Close() }()
		fd.state, files = 3+len(files), append(files, state)
	}
	cmd := exec.Command(binary, args(cfg, machine, fd)...) //nolint:noctx // it outlives the call that starts it
	cmd.ExtraFiles = files
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if inst.limits, err = confine.New(site, bounds(cfg)); err != nil {
		return nil, errors.Join(err, inst.closeConns())
	}
	start := func() error {
		inst.child, err = confine.Start(inst.limits, cmd, proc.StartIn)
		return err
	}
	if cfg.Restore != nil {
		start = withoutHugePages(start)
	}
	if err := start(); err != nil {
		if inst.child != nil {
			err = errors.Join(err, inst.child.Kill())
		}
		inst.limits.Remove()
		return nil, errors.Join(err, inst.closeConns())
	}
	inst.qmp = newQMP(inst.control, inst.handle)
	inst.console.Start(nil)
	inst.log.Start(nil)
	tidied := make(chan struct{})
	go func() {
		defer close(tidied)
		site.Tidy() // what VMs have left whose shim was killed
	}()
	go inst.watch(tidied)
	return inst, nil
}

// withoutHugePages starts a process that gets none, as processes inherit that. The memory
// of a restored guest is a file's, which has none anyway; in them would only be QEMU's
// own memory, where they make a clone 6 MB larger.
func withoutHugePages(start func() error) func() error {
	return func() error {
		_ = unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0) // see prctl(2)
		defer func() { _ = unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0) }()
		return start()
	}
}

// awaitRunning returns when the guest's CPUs run. If they never do, it leaves
// nothing behind.
func (i *instance) awaitRunning(ctx context.Context) error {
	err := i.qmp.execute(ctx, "qmp_capabilities", nil)
	if err == nil && i.cfg.DiskLimit != (vmm.DiskLimit{}) {
		err = i.SetDiskLimit(ctx, i.cfg.DiskLimit)
	}
	var now status
	if err == nil {
		err = i.qmp.execute(ctx, "query-status", &now)
	}
	if err == nil && !now.Running && i.cfg.Restore != nil {
		err = i.awaitLoaded(ctx, &now)
	}
	if err == nil && now.Running {
		return nil
	}
	// A connection that ended means that QEMU is ending; its own words say why.
	if errors.Is(err, errQMPClosed) {
		select {
		case <-i.done:
			return errors.New(i.exit.Detail)
		case <-ctx.Done(): // it hangs instead
		}
	}
	if err == nil {
		err = fmt.Errorf("QEMU does not run the guest: it is %s", now.Status)
	}
	err = errors.Join(err, i.child.Kill())
	<-i.done // its connections are closed by then
	return err
}

// States of a guest; see QEMU's qapi/run-state.json.
const (
	statusLoading = "inmigrate" // it is being restored
	statusIOError = "io-error"  // QEMU holds it by itself
)

// status is what query-status returns.
type status struct {
	Running bool   `json:"running"`
	Status  string `json:"status"`
}

// pair returns two connected stream sockets, one for us and one to be inherited.
func pair() (*net.UnixConn, *os.File, error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	ours := os.NewFile(uintptr(ends[0]), "vmm")
	theirs := os.NewFile(uintptr(ends[1]), "vmm")
	conn, err := net.FileConn(ours) // duplicates it
	_ = ours.Close()
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("make socket pair: %w", err), theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil //nolint:forcetypeassert // that is what we made
}

func size(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

func now() time.Time { return time.Now().UTC() }
