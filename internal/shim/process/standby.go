package process

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/compat"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/stream"
)

var errDismissed = errors.New("the shim was dismissed")

// slotFiles are the files that a shim has as one that stood by, until the start of the VM
// that it was claimed for is confirmed. Before that they are where they were, so that a
// start that is given up has changed nothing of the VM.
type slotFiles struct {
	dir   string
	names map[string]string
	lock  *os.File
}

const (
	// maxClaim bounds a claim, in bytes, and maxClaimFiles the files that come with it.
	maxClaim      = 1 << 20
	maxClaimFiles = 250 // the kernel takes 253 at once (SCM_MAX_FD)
	// claimTime is how long a claim may take to arrive once it has begun.
	claimTime = 5 * time.Second
)

// standBy brings the VM up, takes it through a login and a command, so that its CPUs
// know the code, holds it, and waits for a claim. It reports whether there was one: the spec
// and the launcher are those of the claim then, and the listeners those of its forwards.
func (s *process) standBy(ctx context.Context) (listeners []io.Closer, claimed bool, err error) {
	defer func() {
		if !claimed {
			s.session.Close()
		}
	}()
	listener, err := s.prepareToBeClaimed(ctx)
	if err != nil {
		s.launcher.report(shim.Report{Failure: shim.NewFailure(err)})
		return nil, false, err
	}
	dir := s.spec.RuntimeDir
	defer func() { _ = errors.Join(listener.Close(), os.RemoveAll(dir)) }()
	vmmPID := s.session.Report().VMMPID
	s.launcher.report(shim.Report{PID: os.Getpid(), Start: startOf(os.Getpid()), VMMPID: vmmPID, VMMStart: startOf(vmmPID)})
	if s.awaitCommit(); !isClosed(s.launcher.committed) {
		return nil, false, nil
	}
	s.launcher.report(shim.Report{Committed: true})
	s.launcher.close()
	releaseMemory()
	return s.awaitClaim(ctx, listener)
}

// prepareToBeClaimed brings the VM up, pauses it, and listens for claims.
func (s *process) prepareToBeClaimed(ctx context.Context) (net.Listener, error) {
	starting, cancel := s.starting(ctx)
	defer cancel()
	err := s.rehearsed(starting, nil)
	if err == nil {
		err = s.session.Pause(starting)
	}
	if err != nil {
		return nil, err
	}
	return s.listenForClaim()
}

func (s *process) listenForClaim() (net.Listener, error) {
	dir := s.spec.RuntimeDir
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return stream.ListenUnix(shim.ClaimSocket(dir))
}

// awaitClaim waits for a claim, for the VM's end, or for being told to end.
func (s *process) awaitClaim(ctx context.Context, listener net.Listener) (listeners []io.Closer, claimed bool, err error) {
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	go func() {
		<-s.session.Done()
		_ = listener.Close()
	}()
	for {
		conn, err := listener.Accept()
		if err != nil {
			// It was closed: nobody wants the VM any more.
			return nil, false, nil
		}
		unixConn, ok := conn.(*net.UnixConn)
		if !ok {
			return nil, false, errors.New("claim socket is no unix socket")
		}
		listeners, err := s.takeClaim(unixConn)
		_ = conn.Close()
		switch {
		case err == nil:
			step.Reached(ctx, "claim/taken")
			return listeners, true, nil
		case errors.Is(err, errDismissed):
			return nil, false, nil
		}
		s.log.Warn("claim", "error", err)
	}
}

// takeClaim makes the claimer the shim's launcher. On failure nothing has changed.
func (s *process) takeClaim(conn *net.UnixConn) (listeners []io.Closer, err error) {
	_ = conn.SetDeadline(time.Now().Add(claimTime))
	text, files, err := receive(conn)
	taken := 0 // of the files
	defer func() {
		for _, file := range files[taken:] {
			_ = file.Close()
		}
	}()
	var c shim.ClaimOrder
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err == nil {
		err = compat.Check("the claim", c.Spec.Protocol, shim.OrderProtocol)
	}
	if err != nil {
		return nil, err
	}
	if c.Dismiss {
		_, _ = conn.Write([]byte(shim.Dismissed))
		return nil, errDismissed
	}
	was, is := s.spec.Network.UsedMode(), c.Spec.Network.UsedMode()
	// An interface that stands by can become a port of a bridge as well.
	if is != was && (was != network.TAP || is != network.Bridge) {
		return nil, fmt.Errorf("%w: the VM stands by with network mode %q, and %q is asked for", smolvm.ErrUnsupported, was, is)
	}
	const own = 3 // orders, reports, lock
	if len(files) != own+len(c.Spec.Forwards) {
		return nil, fmt.Errorf("%d files came with it", len(files))
	}
	listeners = []io.Closer{}
	defer func() {
		if err != nil {
			for _, listener := range listeners {
				_ = listener.Close()
			}
		}
	}()
	for _, file := range files[own:] {
		listener, err := listenerOf(file)
		if err != nil {
			return listeners, err
		}
		listeners = append(listeners, listener)
	}
	taken = own
	s.spec, s.slot = c.Spec, &slotFiles{dir: c.Dir, names: c.Names, lock: files[2]}
	s.session.Claim(c.Spec, s.slot.nowAt(c.Spec.VMM.ConsolePath))
	s.launcher = follow(bufio.NewReader(files[0]), files[1], s.log)
	orders, gone := files[0], s.launcher.gone
	go func() {
		<-gone
		_ = orders.Close()
	}()
	for _, file := range files[own:] {
		_ = file.Close()
	}
	return listeners, nil
}

// takeOver gives the files of the slot their names as the VM's, when the start has been
// confirmed. Each has its old name until it has the new one. The VMM has them open.
func (s *process) takeOver() error {
	if s.slot == nil {
		return nil
	}
	for name, path := range s.slot.names {
		temp := path + disk.ClaimedSuffix
		if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("take over %s: %w", name, err)
		}
		err := os.Link(filepath.Join(s.slot.dir, name), temp)
		if err == nil {
			err = os.Rename(temp, path)
		}
		if err != nil {
			return fmt.Errorf("take over %s: %w", name, err)
		}
	}
	s.session.SetConsole(s.spec.VMM.ConsolePath)
	err := os.RemoveAll(s.slot.dir)
	_ = s.slot.lock.Close()
	s.slot = nil
	return err
}

// nowAt returns where the file is that gets a path as one of the VM's.
func (f *slotFiles) nowAt(path string) string {
	for name, later := range f.names {
		if later == path {
			return filepath.Join(f.dir, name)
		}
	}
	return path
}

// receive reads a line and the files that come with it.
func receive(conn *net.UnixConn) (line []byte, files []*os.File, err error) {
	buffer := make([]byte, 64<<10)
	rights := make([]byte, unix.CmsgSpace(4*maxClaimFiles))
	for {
		n, oob, _, _, err := conn.ReadMsgUnix(buffer, rights)
		files = append(files, filesOf(rights[:oob])...)
		if err != nil {
			return nil, files, err
		}
		line = append(line, buffer[:n]...)
		if n > 0 && line[len(line)-1] == '\n' {
			return line, files, nil
		}
		if n == 0 || len(line) > maxClaim {
			return nil, files, errors.New("no claim")
		}
	}
}

func filesOf(rights []byte) []*os.File {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil
	}
	var files []*os.File
	for _, message := range messages {
		fds, err := unix.ParseUnixRights(&message)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "claimed"))
		}
	}
	return files
}
