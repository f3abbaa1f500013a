package process

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/compat"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/stream"
	"github.com/smolvm/smolvm/internal/vmm"
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
// know the code, holds it, and waits for a claim. It reports whether there was one; the
// spec is that of the claim then.
func (s *process) standBy(ctx context.Context) (claimed bool, err error) {
	var u cleanupStack
	defer func() {
		if !claimed {
			u.run()
		}
	}()
	fail := func(err error) (bool, error) {
		s.report(shim.Report{Failure: shim.NewFailure(err)})
		return false, err
	}
	if err := s.startNetwork(&u); err != nil {
		return fail(err)
	}
	u.add(s.kill)
	if err := s.attempt(ctx); err != nil {
		return fail(err)
	}
	if err := s.rehearse(ctx, nil); err != nil {
		return fail(err)
	}
	pauser, ok := s.instance.(vmm.Pauser)
	if !ok {
		return fail(fmt.Errorf("stand by: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend))
	}
	if err := pauser.Pause(ctx); err != nil {
		return fail(err)
	}
	listener, err := s.listenForClaim()
	if err != nil {
		return fail(err)
	}
	dir := s.spec.RuntimeDir
	defer func() { _ = errors.Join(listener.Close(), os.RemoveAll(dir)) }()
	s.report(shim.Report{PID: os.Getpid(), Start: startOf(os.Getpid()), VMMPID: s.instance.PID(), VMMStart: startOf(s.instance.PID())})
	if s.awaitCommit(); !isClosed(s.committed) {
		return false, nil
	}
	s.report(shim.Report{Committed: true})
	_ = s.reports.Close()
	releaseMemory()
	return s.awaitClaim(ctx, listener)
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
func (s *process) awaitClaim(ctx context.Context, listener net.Listener) (bool, error) {
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	go func() {
		<-s.instance.Done()
		_ = listener.Close()
	}()
	for {
		conn, err := listener.Accept()
		if err != nil {
			// It was closed: nobody wants the VM any more.
			return false, nil
		}
		unixConn, ok := conn.(*net.UnixConn)
		if !ok {
			return false, errors.New("claim socket is no unix socket")
		}
		err = s.takeClaim(unixConn)
		_ = conn.Close()
		switch {
		case err == nil:
			step.Reached(ctx, "claim/taken")
			return true, nil
		case errors.Is(err, errDismissed):
			return false, nil
		}
		s.log.Warn("claim", "error", err)
	}
}

// takeClaim makes the claimer the shim's launcher. On failure nothing has changed.
func (s *process) takeClaim(conn *net.UnixConn) (err error) {
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
		return err
	}
	if c.Dismiss {
		_, _ = conn.Write([]byte(shim.Dismissed))
		return errDismissed
	}
	if was, is := s.spec.Network.UsedMode(), c.Spec.Network.UsedMode(); is != was {
		return fmt.Errorf("%w: the VM stands by with network mode %q, and %q is asked for", smolvm.ErrUnsupported, was, is)
	}
	const own = 3 // orders, reports, lock
	if len(files) != own+len(c.Spec.Forwards) {
		return fmt.Errorf("%d files came with it", len(files))
	}
	listeners := []io.Closer{}
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
			return err
		}
		listeners = append(listeners, listener)
	}
	taken = own
	s.spec, s.slot = c.Spec, &slotFiles{dir: c.Dir, names: c.Names, lock: files[2]}
	s.began, s.timeline = time.Now(), nil
	s.reports, s.claimed = files[1], listeners
	s.committed, s.launcherGone = make(chan struct{}), make(chan struct{})
	go func() {
		s.follow(bufio.NewReader(files[0]), s.committed, s.launcherGone)
		_ = files[0].Close()
	}()
	for _, file := range files[own:] {
		_ = file.Close()
	}
	return nil
}

// takeOver gives the files of the slot their names as the VM's, when the start has been
// confirmed. Each has its old name until it has the new one. The VMM has them open.
func (s *process) takeOver() error {
	if s.slot == nil {
		return nil
	}
	for name, path := range s.slot.names {
		temp := path + ".claimed"
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
	err := os.RemoveAll(s.slot.dir)
	_ = s.slot.lock.Close()
	s.slot = nil
	return err
}

// consolePath is where the console's log is now.
func (s *process) consolePath() string {
	if s.slot != nil {
		for name, path := range s.slot.names {
			if path == s.spec.VMM.ConsolePath {
				return filepath.Join(s.slot.dir, name)
			}
		}
	}
	return s.spec.VMM.ConsolePath
}

// wakeUp lets a VM that stood by go on, as what it was claimed for.
func (s *process) wakeUp(ctx context.Context) error {
	bounded, cancel := s.startContext(ctx)
	defer cancel()
	if err := s.limit(bounded); err != nil {
		return err
	}
	if pauser, ok := s.instance.(vmm.Pauser); ok {
		if err := pauser.Resume(bounded); err != nil {
			return s.explain(bounded, err)
		}
	}
	s.step(stepVMM)
	return s.awaitReady(ctx)
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

// rehearse logs in to the guest, which knows who it is, runs commands in it, and ends
// the session. Code that has been run costs an emulated CPU less the next time.
func (s *process) rehearse(ctx context.Context, commands []smolvm.Command) error {
	ctx, cancel := s.startContext(ctx)
	defer cancel()
	err := s.runInGuest(ctx, append([]smolvm.Command{{Args: []string{"true"}}}, commands...)...)
	if err == nil {
		err = s.link.Sync(ctx)
	}
	if err == nil {
		err = s.link.Release(ctx)
	}
	if err != nil {
		return s.explain(ctx, err)
	}
	s.link = nil
	return nil
}

// runInGuest runs commands, one after the other, as root.
func (s *process) runInGuest(ctx context.Context, commands ...smolvm.Command) error {
	hostKey, err := ssh.NewSignerFromKey(ed25519.PrivateKey(s.spec.Hello.HostKey))
	if err != nil {
		return err
	}
	client := agent.NewClient(agent.ClientConfig{
		Dial:    s.link.Open,
		User:    "root",
		Signer:  hostKey, // none is asked for over the guest channel
		HostKey: hostKey.PublicKey(),
	})
	defer func() { _ = client.Close() }()
	for _, command := range commands {
		var output lastWords
		command.Stdout, command.Stderr = &output, &output
		status, err := client.Exec(ctx, command)
		if err != nil {
			return err
		}
		if !status.Success() {
			return fmt.Errorf("command %q: %s: %s", command.Args, status, strings.TrimSpace(string(output)))
		}
	}
	return nil
}

// lastWords keeps the end of what is written.
type lastWords []byte

func (w *lastWords) Write(p []byte) (int, error) {
	const enough = 1 << 10
	*w = append(*w, p...)
	*w = (*w)[max(0, len(*w)-enough):]
	return len(p), nil
}
