package guest

import (
	"encoding/json"
	"errors"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// workspaceOrder is what the program of one operation is told. The command of a step comes as
// its own arguments and environment.
type workspaceOrder struct {
	wire.WorkspaceRequest

	User, Dir string
}

// workspace serves one operation of a workspace. A program of its own does it, whose memory
// goes with it, and whose namespaces are the step's.
func (l login) workspace(newChannel ssh.NewChannel) {
	var request wire.WorkspaceRequest
	err := decode(newChannel, &request)
	if err == nil && l.user.uid != 0 {
		err = errors.New("only root may use the guest as a workspace")
	}
	if err == nil && request.Root == nil && request.Overlay == "" {
		err = l.server.modules.load("overlay")
	}
	if err != nil {
		refuse(newChannel, err)
		return
	}
	channel, requests, err := newChannel.Accept()
	if err != nil {
		return
	}
	command, err := l.workspaceJob(channel, request)
	if err != nil {
		go ssh.DiscardRequests(requests)
		reportFailure(channel, err)
		_ = channel.Close()
		return
	}
	l.run(channel, requests, command)
	if request.Root != nil && request.Root.Pause {
		resumeCommands() // the program may have been killed
	}
}

// workspaceJob returns the program of an operation.
func (l login) workspaceJob(channel ssh.Channel, request wire.WorkspaceRequest) (*job, error) {
	if err := request.Exec.Unpack(channel); err != nil {
		return nil, err
	}
	asked := request.Exec
	request.Exec = wire.ExecRequest{}
	order, err := json.Marshal(workspaceOrder{WorkspaceRequest: request, User: asked.User, Dir: asked.Dir})
	if err != nil {
		return nil, err
	}
	command := &job{
		argv: append([]string{"/proc/self/exe", workspaceCommand, string(order)}, asked.Args...),
		dir:  "/", user: l.user, noStdin: asked.NoStdin, mortal: true,
		// What is mounted goes with the program, and with a step all that it has started.
		namespaces: unix.CLONE_NEWNS,
	}
	if step := request.Step; step != nil {
		if len(asked.Args) == 0 {
			return nil, errors.New("no command to run")
		}
		command.env = lastWins(append(stepEnvironment(l.env), asked.Env...))
		command.namespaces |= unix.CLONE_NEWPID | unix.CLONE_NEWIPC
		if step.NoNetwork {
			command.namespaces |= unix.CLONE_NEWNET
		}
	}
	return command, nil
}

// stepEnvironment returns what a step's command finds set unless its image says otherwise. HOME
// is not known yet.
func stepEnvironment(env []string) []string {
	return append([]string{"PATH=" + defaultPath}, env...)
}

// hasVariable reports whether an environment has a variable.
func hasVariable(env []string, name string) bool {
	for _, entry := range env {
		if strings.HasPrefix(entry, name+"=") {
			return true
		}
	}
	return false
}
