package session

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// errNoTrue reports that the image has not even the command `true`.
var errNoTrue = errors.New("the guest has no command true")

// exitNotFound is the exit status of a command that is not there, as shells have it.
const exitNotFound = 127

// Rehearse logs in to the guest, which knows who it is, runs commands in it, and ends
// the session. Code that has been run costs an emulated CPU less the next time.
func (s *Session) Rehearse(ctx context.Context, commands []smolvm.Command) error {
	ctx, cancel := s.startContext(ctx)
	defer cancel()
	err := s.runInGuest(ctx, append([]smolvm.Command{{Args: []string{"true"}}}, commands...)...)
	if errors.Is(err, errNoTrue) { // not every image has it
		err = s.runInGuest(ctx, append([]smolvm.Command{{Args: wire.Noop()}}, commands...)...)
	}
	if err == nil {
		err = s.hangUpInOrder(ctx)
	}
	if err != nil {
		return s.explain(ctx, err)
	}
	s.line.release()
	return nil
}

// hangUpInOrder has the guest write out its file systems, and ends the session, but not the
// channel.
func (s *Session) hangUpInOrder(ctx context.Context) error {
	link, err := s.agentLink(ctx)
	if err == nil {
		err = link.Sync(ctx)
	}
	if err == nil {
		err = link.Release(ctx)
	}
	return err
}

// dialLink opens a connection to the guest's agent, for the session itself.
func (s *Session) dialLink(ctx context.Context) (net.Conn, error) {
	link, err := s.agentLink(ctx)
	if err != nil {
		return nil, err
	}
	return link.Open(ctx)
}

// newClient returns a client of the guest's agent, for the session itself.
func (s *Session) newClient() (*agent.Client, error) {
	hostKey, err := ssh.NewSignerFromKey(ed25519.PrivateKey(s.spec.Hello.HostKey))
	if err != nil {
		return nil, err
	}
	return agent.NewClient(agent.ClientConfig{
		Dial:    s.dialLink,
		User:    "root",
		Signer:  hostKey, // none is asked for over the guest channel
		HostKey: hostKey.PublicKey(),
	}), nil
}

// runInGuest runs commands, one after the other, as root.
func (s *Session) runInGuest(ctx context.Context, commands ...smolvm.Command) error {
	client, err := s.newClient()
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	for _, command := range commands {
		var output lastWords
		command.Stdout, command.Stderr = &output, &output
		status, err := client.Exec(ctx, command)
		if err != nil {
			return err
		}
		if status.Code == exitNotFound && slices.Equal(command.Args, []string{"true"}) {
			return errNoTrue
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
