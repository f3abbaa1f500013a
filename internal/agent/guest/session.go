package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// Exit statuses of a command that could not be started, as shells have them.
const (
	exitNotFound = 127
	exitNotRun   = 126
)

// exec serves one command of our own client.
func (l login) exec(newChannel ssh.NewChannel) {
	var request wire.ExecRequest
	if err := decode(newChannel, &request); err != nil {
		refuse(newChannel, err)
		return
	}
	channel, requests, err := newChannel.Accept()
	if err != nil {
		return
	}
	var user account
	if err = request.Unpack(channel); err == nil {
		user, err = l.commandUser(request)
	}
	if err == nil && request.Dir != "" && request.Dir == l.workDir {
		err = makeWorkingDir("/", request.Dir)
	}
	if err != nil {
		go ssh.DiscardRequests(requests)
		reportFailure(channel, err)
		_ = channel.Close()
		return
	}
	command := &job{
		argv:    request.Args,
		env:     l.environment(user, request.TTY, request.Env),
		dir:     workingDir(request.Dir, user),
		user:    user,
		tty:     request.TTY,
		noStdin: request.NoStdin,
		mortal:  request.TTY == nil,
	}
	l.run(channel, requests, command)
}

// commandUser returns the user that a request's command is to run as.
func (l login) commandUser(request wire.ExecRequest) (account, error) {
	switch {
	case len(request.Args) == 0:
		return account{}, errors.New("no command to run")
	case request.User == "" || request.User == l.user.name:
		return l.user, nil
	case l.user.uid != 0:
		return account{}, errors.New("only root may run commands as another user")
	}
	return findUser(request.User)
}

func workingDir(asked string, user account) string {
	if asked != "" {
		return asked
	}
	// An account may be there without its home.
	if info, err := os.Stat(user.home); err == nil && info.IsDir() {
		return user.home
	}
	return "/"
}

// makeWorkingDir makes the directory that the VM's configuration has for commands, and those above
// it, as far as they are missing: root's, with mode 0755, as docker does. Links lead to places in
// the root; what is made is never made through a link that leads nowhere.
func makeWorkingDir(root, dir string) error {
	if _, err := os.Stat(filepath.Join(root, dir)); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return nil // what is wrong with it the start of the command says
	}
	made, err := makeDirIn(root, dir)
	if err != nil {
		return fmt.Errorf("make the working directory %s: %w", dir, err)
	}
	return made.Close()
}

// environment returns the variables of a command of the user. Of two with the same name the
// later counts.
func (l login) environment(user account, tty *wire.TTY, asked []string) []string {
	env := append(user.environment(), l.env...)
	if tty != nil {
		env = append(env, "TERM="+tty.Term)
	}
	return lastWins(append(env, asked...))
}

// lastWins keeps the last of several settings of one variable.
func lastWins(env []string) []string {
	index := make(map[string]int, len(env))
	kept := env[:0:0]
	for _, entry := range env {
		name, _, ok := strings.Cut(entry, "=")
		if !ok || name == "" {
			continue
		}
		if i, seen := index[name]; seen {
			kept[i] = entry
			continue
		}
		index[name] = len(kept)
		kept = append(kept, entry)
	}
	return kept
}

// run runs a command on a channel and ends the channel with its status. A client
// that goes away takes the command with it.
func (l login) run(channel ssh.Channel, requests <-chan *ssh.Request, command *job) {
	defer func() { _ = channel.Close() }()
	command.stdin, command.stdout, command.stderr = channel, channel, channel.Stderr()
	if err := command.start(l.server.reaper); err != nil {
		go ssh.DiscardRequests(requests)
		reportFailure(channel, err)
		return
	}
	ended, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		for request := range requests {
			if request.Type == wire.PIDRequest {
				reportPID(channel, command.pid)
			}
			ok := command.request(request)
			if request.WantReply {
				_ = request.Reply(ok, nil)
			}
		}
		if ended.Err() == nil {
			// The channel is closed, but the command is not over.
			// What a terminal's user has put into a session of its own, such as a
			// server of tmux, goes on.
			command.signal(command.mortal, unix.SIGHUP, unix.SIGKILL)
		}
	}()
	status := command.wait()
	cancel()
	reportStatus(channel, status)
}

// request serves a request to a command that runs.
func (j *job) request(request *ssh.Request) bool {
	switch request.Type {
	case "signal":
		var message struct{ Name string }
		if ssh.Unmarshal(request.Payload, &message) != nil {
			return false
		}
		number := unix.Signal(wire.SignalNumber(message.Name))
		if number != 0 {
			j.signal(number == unix.SIGKILL, number)
		}
		return number != 0
	case wire.PIDRequest:
		return true // it was reported before
	case "eow@openssh.com":
		j.breakPipe()
		return true
	case "window-change":
		var size struct{ Columns, Rows, Width, Height uint32 }
		if ssh.Unmarshal(request.Payload, &size) != nil {
			return false
		}
		j.resize(size.Columns, size.Rows)
		return true
	}
	return false
}

func reportFailure(channel ssh.Channel, err error) {
	_, _ = io.WriteString(channel.Stderr(), "smolvm: "+err.Error()+"\n")
	code := uint32(exitNotRun)
	if errors.Is(err, errNotFound) || errors.Is(err, fs.ErrNotExist) {
		code = exitNotFound
	}
	reportCode(channel, code)
}

func reportPID(channel ssh.Channel, pid int) {
	_, _ = channel.SendRequest(wire.PIDRequest, false, ssh.Marshal(struct{ PID uint32 }{uint32(pid)}))
}

func reportCode(channel ssh.Channel, code uint32) {
	_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{code}))
}

func reportStatus(channel ssh.Channel, status unix.WaitStatus) {
	name := wire.SignalName(int(status.Signal()))
	if !status.Signaled() || name == "" {
		code := uint32(status.ExitStatus())
		if status.Signaled() { // one without a name, such as a real-time signal
			code = 128 + uint32(status.Signal())
		}
		reportCode(channel, code)
		return
	}
	_, _ = channel.SendRequest("exit-signal", false, ssh.Marshal(struct {
		Name       string
		CoreDumped bool
		Message    string
		Language   string
	}{name, status.CoreDump(), "", ""}))
}

// session serves a standard session: one command, shell or subsystem.
func (l login) session(newChannel ssh.NewChannel) {
	channel, requests, err := newChannel.Accept()
	if err != nil {
		return
	}
	var tty *wire.TTY
	var env []string
	for request := range requests {
		ok, begun := true, false
		switch request.Type {
		case "env":
			var setting struct{ Name, Value string }
			if ok = ssh.Unmarshal(request.Payload, &setting) == nil; ok {
				env = append(env, setting.Name+"="+setting.Value)
			}
		case "pty-req":
			tty, ok = parsePTY(request.Payload)
		case "shell", "exec", "subsystem":
			begun = true
		default:
			ok = false
		}
		if !begun {
			if request.WantReply {
				_ = request.Reply(ok, nil)
			}
			continue
		}
		l.begin(channel, requests, request, sessionOptions{tty, env})
		return
	}
	_ = channel.Close()
}

type sessionOptions struct {
	tty *wire.TTY
	env []string
}

func parsePTY(payload []byte) (*wire.TTY, bool) {
	var message struct {
		Term                         string
		Columns, Rows, Width, Height uint32
		Modes                        string
	}
	if ssh.Unmarshal(payload, &message) != nil {
		return nil, false
	}
	return &wire.TTY{Term: message.Term, Columns: int(message.Columns), Rows: int(message.Rows)}, true
}

// begin runs what a session was opened for.
func (l login) begin(channel ssh.Channel, requests <-chan *ssh.Request, request *ssh.Request, opts sessionOptions) {
	command := &job{
		env:  l.environment(l.user, opts.tty, opts.env),
		dir:  workingDir("", l.user),
		user: l.user,
		tty:  opts.tty,
	}
	var message struct{ Text string }
	if request.Type != "shell" && ssh.Unmarshal(request.Payload, &message) != nil {
		_ = request.Reply(false, nil)
		_ = channel.Close()
		return
	}
	switch request.Type {
	case "shell":
		command.argv = []string{l.user.shell}
		command.arg0 = "-" + path.Base(l.user.shell) // a login shell, by custom
	case "exec":
		command.argv = []string{l.user.shell, "-c", message.Text}
	case "subsystem":
		if message.Text != "sftp" {
			_ = request.Reply(false, nil)
			_ = channel.Close()
			return
		}
		if l.user.uid == 0 {
			_ = request.Reply(true, nil)
			go ssh.DiscardRequests(requests)
			serveSFTP(channel, command.dir)
			return
		}
		// Another process, as ours would serve it as root.
		command.argv = []string{"/proc/self/exe", sftpCommand}
	}
	_ = request.Reply(true, nil)
	l.run(channel, requests, command)
}

// serveSFTP serves files to the end of the connection.
func serveSFTP(channel ssh.Channel, dir string) {
	defer func() { _ = channel.Close() }()
	server, err := sftp.NewServer(channel, sftp.WithServerWorkingDirectory(dir))
	if err != nil {
		reportFailure(channel, err)
		return
	}
	if err := server.Serve(); err != nil && !errors.Is(err, io.EOF) {
		reportFailure(channel, err)
		return
	}
	reportCode(channel, 0)
}
