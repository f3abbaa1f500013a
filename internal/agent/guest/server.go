package guest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/plain"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/stream"
)

// handshakeTimeout bounds how long a connection may take to log in; it is long
// because an emulated guest under load is slow.
const handshakeTimeout = 2 * time.Minute

const serverVersion = "SSH-2.0-smolvm"

// Server is the guest's SSH server. It serves whoever has one of the authorized
// keys as any user of the guest.
type Server struct {
	reaper *reaper
	// proved returns an error if the guest can't run programs, and may take as long as one
	// runs. The host's channels wait for it. Nil: nothing has to be proved.
	proved func() error
	// modules are those of the kernel that can be asked for; nil: there are none.
	modules *demandedModules

	mu       sync.Mutex // guards the following
	identity identity
	ready    chan struct{} // closed when commands may start; nil: at once
}

// identity is what the last hello made of the server.
type identity struct {
	config  *ssh.ServerConfig // asks for a key
	trusted *ssh.ServerConfig // does not
	hostKey ssh.PublicKey
	env     []string
	workDir string // made when a command is to be run in it
}

// NewServer returns a server that refuses everybody until it has an identity.
func NewServer() *Server { return newServer(newReaper(false)) }

func newServer(r *reaper) *Server { return &Server{reaper: r} }

// SetIdentity gives the server the host key, the authorized keys and the
// environment of a hello. Connections that are open keep what they have.
func (s *Server) SetIdentity(hello wire.Hello) error {
	if len(hello.HostKey) != ed25519.PrivateKeySize {
		return fmt.Errorf("SSH host key has %d bytes, not %d", len(hello.HostKey), ed25519.PrivateKeySize)
	}
	signer, err := ssh.NewSignerFromKey(ed25519.PrivateKey(hello.HostKey))
	if err != nil {
		return fmt.Errorf("SSH host key: %w", err)
	}
	trusted := &ssh.ServerConfig{
		ServerVersion: serverVersion,
		NoClientAuth:  true,
		NoClientAuthCallback: func(meta ssh.ConnMetadata) (*ssh.Permissions, error) {
			_, err := findAccount(meta.User())
			return nil, err
		},
	}
	config := &ssh.ServerConfig{
		ServerVersion: serverVersion,
		PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if !slices.ContainsFunc(hello.AuthorizedKeys, func(k []byte) bool { return bytes.Equal(k, key.Marshal()) }) {
				return nil, errors.New("key is not authorized")
			}
			_, err := findAccount(meta.User())
			return nil, err
		},
	}
	config.AddHostKey(signer)
	trusted.AddHostKey(signer)
	var env []string
	for _, name := range slices.Sorted(maps.Keys(hello.Env)) {
		env = append(env, name+"="+hello.Env[name])
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.identity = identity{config: config, trusted: trusted, hostKey: signer.PublicKey(), env: env, workDir: hello.WorkingDir}
	return nil
}

// holdBack keeps commands and connections into the guest waiting from now on, until
// what it returns is called. Logging in goes on meanwhile.
func (s *Server) holdBack() (release func()) {
	ready := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = ready
	return func() { close(ready) }
}

// awaitReady returns when commands may start.
func (s *Server) awaitReady() {
	s.mu.Lock()
	ready := s.ready
	s.mu.Unlock()
	if ready != nil {
		<-ready
	}
}

// Listen serves the connections of a listener until it is closed.
func (s *Server) Listen(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go s.Serve(conn)
	}
}

// Serve serves one connection to its end.
func (s *Server) Serve(conn net.Conn) {
	identity := s.current()
	s.serve(conn, identity, identity.config)
}

// ServeTrusted is Serve for a connection that comes over the guest channel. The connection
// must have a method CloseWrite. Whoever can open one holds the VM itself, so no key is asked
// for, and it may be a channel without SSH around it.
func (s *Server) ServeTrusted(conn net.Conn) {
	peeked, ok := conn.(stream.Peeked)
	if !ok {
		peeked = peek(conn)
	}
	identity := s.current()
	if first, err := peeked.Reader.Peek(plain.PeekSize); err == nil && plain.IsOpen(first) {
		s.servePlain(peeked, identity)
		return
	}
	s.serve(peeked, identity, identity.trusted)
}

// servePlain serves the one channel of a connection.
func (s *Server) servePlain(conn stream.Peeked, identity identity) {
	channel, err := plain.Accept(conn)
	if err != nil {
		return
	}
	user, err := ownAccount()
	switch {
	case identity.hostKey == nil || channel.Identity() != ssh.FingerprintSHA256(identity.hostKey):
		err = errors.New("it is not the guest that was meant")
	case s.proved != nil && err == nil:
		err = s.proved()
	}
	if err != nil {
		refuse(channel, err)
		return
	}
	login{server: s, user: user, env: identity.env, workDir: identity.workDir}.handle(channel)
}

// fingerprint returns the fingerprint of the host key; empty if there is no key yet.
func (s *Server) fingerprint() string {
	key := s.current().hostKey
	if key == nil {
		return ""
	}
	return ssh.FingerprintSHA256(key)
}

func (s *Server) current() identity {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.identity
}

func (s *Server) serve(conn net.Conn, identity identity, config *ssh.ServerConfig) {
	defer func() { _ = conn.Close() }()
	if config == nil {
		return
	}
	_ = conn.SetDeadline(time.Now().Add(handshakeTimeout))
	sshConn, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return
	}
	_ = conn.SetDeadline(noDeadline)
	go answerGlobal(requests)
	user, err := findAccount(sshConn.User())
	if err != nil {
		return
	}
	login := login{server: s, user: user, env: identity.env, workDir: identity.workDir}
	for channel := range channels {
		go login.handle(channel)
	}
}

// answerGlobal answers keepalives, so that clients see that we are alive, by
// refusing them, as OpenSSH does.
func answerGlobal(requests <-chan *ssh.Request) {
	for request := range requests {
		if request.WantReply {
			_ = request.Reply(false, nil)
		}
	}
}

// login is a user's connection.
type login struct {
	server *Server
	user   account
	env    []string
	// workDir is made when a command is to be run in it.
	workDir string
}

func (l login) handle(channel ssh.NewChannel) {
	l.server.awaitReady()
	switch channel.ChannelType() {
	case "session":
		l.session(channel)
	case wire.ReadyChannel:
		if channel, _, err := channel.Accept(); err == nil {
			_ = channel.Close()
		}
	case wire.ExecChannel:
		l.exec(channel)
	case wire.TreeChannel:
		l.tree(channel)
	case wire.WorkspaceChannel:
		l.workspace(channel)
	case "direct-tcpip":
		var to struct {
			Host       string
			Port       uint32
			OriginHost string
			OriginPort uint32
		}
		if err := ssh.Unmarshal(channel.ExtraData(), &to); err != nil {
			refuse(channel, err)
			return
		}
		forward(channel, "tcp", net.JoinHostPort(to.Host, strconv.FormatUint(uint64(to.Port), 10)))
	case "direct-streamlocal@openssh.com":
		var to struct {
			Path     string
			Reserved string
			Unused   uint32
		}
		if err := ssh.Unmarshal(channel.ExtraData(), &to); err != nil {
			refuse(channel, err)
			return
		}
		forward(channel, "unix", to.Path)
	default:
		_ = channel.Reject(ssh.UnknownChannelType, "the agent has no channel of type "+channel.ChannelType())
	}
}

// refuse says why a channel is not opened.
func refuse(channel ssh.NewChannel, err error) {
	_ = channel.Reject(ssh.ConnectionFailed, err.Error())
}

// decode reads the request of one of our own channels.
func decode(channel ssh.NewChannel, request any) error {
	decoder := json.NewDecoder(bytes.NewReader(channel.ExtraData()))
	if err := decoder.Decode(request); err != nil {
		return fmt.Errorf("bad request: %w", err)
	}
	return nil
}

// forward connects a channel to an address.
func forward(newChannel ssh.NewChannel, network, address string) {
	dialer := net.Dialer{Timeout: handshakeTimeout}
	conn, err := dialer.DialContext(context.Background(), network, address)
	if err != nil {
		refuse(newChannel, err)
		return
	}
	plain.Join(newChannel, conn)
}
