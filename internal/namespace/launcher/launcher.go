// Package launcher is what a program does that launches a command in namespaces, as package
// namespace orders: it makes what the command finds there, gives up all rights, and becomes
// the command, or the supervisor of it.
//
// Package namespace has made the process in the new namespaces.
package launcher

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/namespace"
)

// firstFile is the first file that a process inherits beside its standard streams.
const firstFile = 3

// Run launches a command. It returns only if it fails, which it has reported then, or when a
// supervised command has ended, or when none was to be executed.
func Run(order namespace.Order) error {
	// What a thread may do is its own. The thread that executes the command is this one.
	runtime.LockOSThread()
	l := &launch{Order: order, reports: firstFile + order.Files, stdin: firstFile + order.Files + 1}
	unix.CloseOnExec(l.reports)
	unix.CloseOnExec(l.stdin)
	if err := l.prepare(); err != nil {
		return err
	}
	switch {
	case order.Path == "":
		return nil
	case order.Supervised:
		return l.supervise()
	}
	return l.execute()
}

// launch is one order that is being carried out.
type launch struct {
	namespace.Order
	reports, stdin int // descriptors
}

// prepare makes what the command finds in its namespaces.
func (l *launch) prepare() error {
	if err := l.mount(); err != nil {
		return l.failed(namespace.StepMount, err)
	}
	file := -1
	if l.MTU != 0 {
		var step namespace.Step
		var err error
		if file, step, err = makeNetwork(l.MTU, l.Owner); err != nil {
			return l.failed(step, err)
		}
		defer func() { _ = unix.Close(file) }()
	}
	return l.report(namespace.Report{Ready: true}, file)
}

// execute replaces this process by the command.
func (l *launch) execute() error {
	if err := l.drop(); err != nil {
		return l.failed(namespace.StepDrop, err)
	}
	if err := unix.Dup3(l.stdin, 0, 0); err != nil {
		return l.failed(namespace.StepExecute, err)
	}
	// Whatever else has come from who started this process. An older kernel leaves it.
	_ = unix.CloseRange(uint(l.stdin), math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	err := syscall.Exec(l.Path, l.Args, l.Env)
	return l.failed(namespace.StepExecute, fmt.Errorf("%s: %w", l.Path, err))
}

// drop gives up what this thread may do but what the command is to keep, and makes it die with
// its parent: a change of rights has rid it of that.
func (l *launch) drop() error {
	if err := dropCapabilities(l.Capabilities); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	return l.dieWithParent()
}

func (l *launch) dieWithParent() error {
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	// The parent of the first process of a PID namespace is outside.
	if parent := os.Getppid(); parent != l.Parent && parent != 0 {
		return errors.New("its parent has ended")
	}
	return nil
}

// dropCapabilities leaves this thread, and what it executes, the capabilities that are given
// as far as it has them.
func dropCapabilities(keep []uintptr) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return os.NewSyscallError("capget", err)
	}
	var mask [2]uint32
	for _, c := range keep {
		mask[c/32] |= 1 << (c % 32)
	}
	// The set that bounds all that could be got, up to the last capability that there is.
	for c := uintptr(0); ; c++ {
		if c < 64 && mask[c/32]&(1<<(c%32)) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); errors.Is(err, unix.EINVAL) {
			break
		} else if err != nil {
			return os.NewSyscallError("prctl", err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	for i := range data {
		data[i].Permitted &= mask[i]
		data[i].Effective &= mask[i]
		data[i].Inheritable = 0
	}
	return os.NewSyscallError("capset", unix.Capset(&header, &data[0]))
}

// report tells the process that has started this one. A file goes along unless it is negative.
func (l *launch) report(r namespace.Report, file int) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	var rights []byte
	if file >= 0 {
		rights = unix.UnixRights(file)
	}
	return os.NewSyscallError("sendmsg", unix.Sendmsg(l.reports, text, rights, nil, unix.MSG_NOSIGNAL))
}

// failed reports the error of a step, and returns it.
func (l *launch) failed(step namespace.Step, err error) error {
	return errors.Join(err, l.report(namespace.Failed(step, err), -1))
}
