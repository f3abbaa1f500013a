package namespace

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Orders are what a program reads on its standard input that is to be a launcher: one line.
type Orders struct {
	Launch *Order `json:"launch"`
}

// Order is what a launcher does. The two are the same program, so its form may change freely.
type Order struct {
	// Path is the command; empty if nothing is to be executed. It gets the arguments Args,
	// the first of them its name, and the environment Env.
	Path string   `json:"path,omitempty"`
	Args []string `json:"args,omitempty"`
	Env  []string `json:"env,omitempty"`
	// Files is how many inherited files the command has beside its standard streams. Behind
	// them the launcher has two more: where it reports to, and the command's standard input.
	Files int `json:"files"`
	// Parent is the process id of whoever has started the launcher.
	Parent int `json:"parent"`
	// MTU of the network in bytes; zero if there is none. Owner is the TAP's.
	MTU   int `json:"mtu,omitempty"`
	Owner int `json:"owner,omitempty"`

	Mounts       []Mount   `json:"mounts,omitempty"`
	Supervised   bool      `json:"supervised,omitempty"`
	Capabilities []uintptr `json:"capabilities,omitempty"`
}

// Report is a message of a launcher. With Ready comes the file of link0 if there is a network;
// with Started, which only a supervisor sends, a pidfd of the command.
type Report struct {
	Ready   bool     `json:"ready,omitempty"`
	Started bool     `json:"started,omitempty"`
	Exit    string   `json:"exit,omitempty"`
	Failure *failure `json:"failure,omitempty"`
}

// Failed returns the report of what a launcher could not do.
func Failed(step Step, err error) Report {
	return Report{Failure: &failure{Step: step, Errno: errnoOf(err), Text: err.Error()}}
}

// Step is what is done for a command before it is executed.
type Step string

// The steps, in their order.
const (
	stepClone     Step = "make the namespaces"
	StepInterface Step = "make a TAP interface"
	StepBridge    Step = "make a bridge"
	StepLink      Step = "configure the interfaces"
	StepMount     Step = "mount its files"
	StepDrop      Step = "drop privileges"
	StepExecute   Step = "execute it"
)

// failure is the error of a step.
type failure struct {
	Step  Step          `json:"step"`
	Errno syscall.Errno `json:"errno,omitempty"`
	Text  string        `json:"text"`
}

func (f *failure) Error() string { return string(f.Step) + ": " + f.Text }

// Unwrap returns the number of the error, or nil.
func (f *failure) Unwrap() error {
	if f.Errno == 0 {
		return nil
	}
	return f.Errno
}

func errnoOf(err error) syscall.Errno {
	errno, _ := errors.AsType[syscall.Errno](err)
	return errno
}

// orderOf returns the order that makes a launcher a command.
func orderOf(cmd *exec.Cmd, opts Options) Order {
	order := Order{
		Path: cmd.Path, Args: cmd.Args, Env: cmd.Environ(), Files: len(cmd.ExtraFiles), Parent: os.Getpid(),
		Mounts: opts.Mounts, Supervised: opts.Supervised, Capabilities: opts.Capabilities,
	}
	if n := opts.Network; n != nil {
		order.MTU, order.Owner = n.mtu(), os.Geteuid()
		if n.Owner != nil {
			order.Owner = *n.Owner
		}
	}
	return order
}

// launching are the capabilities that a launcher needs within a user namespace.
var launching = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SETPCAP}

// attributes returns those of a launcher.
func attributes(of *syscall.SysProcAttr, opts Options) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{}
	if of != nil {
		*attr = *of
	}
	if opts.Network != nil {
		attr.Cloneflags |= unix.CLONE_NEWNET
	}
	if len(opts.Mounts) > 0 {
		attr.Cloneflags |= unix.CLONE_NEWNS
	}
	if opts.Supervised {
		attr.Cloneflags |= unix.CLONE_NEWPID
	}
	if attr.Cloneflags != 0 && !privileged() {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}}
		attr.AmbientCaps = launching
	}
	return attr
}

// privileged reports whether this process may make namespaces and interfaces as it is.
func privileged() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return false
	}
	has := func(c uint) bool { return data[c/32].Effective&(1<<(c%32)) != 0 }
	return has(unix.CAP_SYS_ADMIN) && has(unix.CAP_NET_ADMIN)
}

// maxReport is how long a report may be, in bytes.
const maxReport = 16 << 10

// past and never are deadlines.
var (
	past  = time.Unix(1, 0)
	never = time.Time{}
)

// next returns the next report, and the file that came with it. A failure is an error; the end
// of the reports is [io.EOF].
func (c *call) next() (Report, *os.File, error) { return readReport(c.reports) }

func readReport(conn *net.UnixConn) (Report, *os.File, error) {
	text, rights := make([]byte, maxReport), make([]byte, unix.CmsgSpace(4))
	n, rightsLen, _, _, err := conn.ReadMsgUnix(text, rights)
	if err != nil {
		return Report{}, nil, err
	}
	file, err := receivedFile(rights[:rightsLen])
	if err != nil {
		return Report{}, nil, err
	}
	var r Report
	if json.Unmarshal(text[:n], &r) != nil {
		err = errNoLauncher
	} else if r.Failure != nil {
		err = r.Failure
	}
	if err != nil && file != nil {
		_ = file.Close()
		file = nil
	}
	return r, file, err
}

// receivedFile returns the file of a control message; nil if there is none.
func receivedFile(rights []byte) (*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil || len(messages) == 0 {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.Join(errNoLauncher, err)
	}
	return os.NewFile(uintptr(fds[0]), "received"), nil
}
