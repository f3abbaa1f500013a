package vmmfake

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/plain"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// serveTCP serves SSH on the guest's network.
func (g *guest) serveTCP(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go g.serveSSH(conn, false)
	}
}

// serveSSH serves one connection. One that comes over the guest channel is trusted.
func (g *guest) serveSSH(conn net.Conn, trusted bool) {
	defer func() { _ = conn.Close() }()
	g.mu.Lock()
	id := g.identity
	g.mu.Unlock()
	config := id.config
	if trusted {
		config = id.trusted
	}
	if config == nil {
		return
	}
	_, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests)
	for channel := range channels {
		go g.serveChannel(channel, id.env)
	}
}

func (g *guest) serveChannel(channel ssh.NewChannel, env []string) {
	g.machine.cpu.step()
	switch channel.ChannelType() {
	case "session":
		g.session(channel, env)
	case wire.ReadyChannel:
		if channel, _, err := channel.Accept(); err == nil {
			_ = channel.Close()
		}
	case wire.ExecChannel:
		g.exec(channel, env)
	case wire.TreeChannel:
		g.tree(channel)
	case "direct-tcpip":
		g.forward(channel)
	case wire.WorkspaceChannel:
		g.workspace(channel)
	default:
		rejectUnknown(channel)
	}
}

func refuse(channel ssh.NewChannel, err error) {
	_ = channel.Reject(ssh.ConnectionFailed, err.Error())
}

// exec serves one command of our own client.
func (g *guest) exec(newChannel ssh.NewChannel, env []string) {
	var request wire.ExecRequest
	if err := json.Unmarshal(newChannel.ExtraData(), &request); err != nil {
		refuse(newChannel, err)
		return
	}
	channel, requests, err := newChannel.Accept()
	if err != nil {
		return
	}
	if err := request.Unpack(channel); err != nil {
		_ = channel.Close()
		return
	}
	p := &process{args: request.Args, env: append(env, request.Env...), dir: request.Dir, tty: request.TTY}
	if request.NoStdin {
		p.stdin = strings.NewReader("")
	}
	g.runOn(channel, requests, p)
}

// session serves a standard session: one command, or a shell.
func (g *guest) session(newChannel ssh.NewChannel, env []string) {
	channel, requests, err := newChannel.Accept()
	if err != nil {
		return
	}
	p := &process{env: env}
	for request := range requests {
		ok := true
		var message struct{ Name, Value string }
		var command struct{ Text string }
		switch request.Type {
		case "env":
			if ok = ssh.Unmarshal(request.Payload, &message) == nil; ok {
				p.env = append(p.env, message.Name+"="+message.Value)
			}
		case "shell":
			p.args = []string{"sh"}
		case "exec":
			if ok = ssh.Unmarshal(request.Payload, &command) == nil; ok {
				p.args = []string{"sh", "-c", command.Text}
			}
		default:
			ok = request.Type == "pty-req"
		}
		if request.WantReply {
			_ = request.Reply(ok, nil)
		}
		if p.args != nil {
			g.runOn(channel, requests, p)
			return
		}
	}
	_ = channel.Close()
}

// brokenPipe is an output whose reader can go away.
type brokenPipe struct {
	io.Writer
	cpu    *cpu
	broken chan struct{}
}

func (b brokenPipe) Write(p []byte) (int, error) {
	b.cpu.step()
	select {
	case <-b.broken:
		return 0, syscall.EPIPE
	default:
		return b.Writer.Write(p)
	}
}

// runOn runs a command on a channel and ends the channel with its status. A client that
// goes away takes the command with it.
func (g *guest) runOn(channel ssh.Channel, requests <-chan *ssh.Request, p *process) {
	defer func() { _ = channel.Close() }()
	broken := make(chan struct{})
	if p.stdin == nil {
		p.stdin = channel
	}
	p.stdout = brokenPipe{channel, &g.machine.cpu, broken}
	p.stderr = brokenPipe{channel.Stderr(), &g.machine.cpu, broken}
	if p.tty != nil {
		p.stderr = p.stdout
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	over := make(chan struct{})
	go func() {
		var once sync.Once
		for request := range requests {
			ok := true
			var message struct{ Name string }
			switch request.Type {
			case "signal":
				if ok = ssh.Unmarshal(request.Payload, &message) == nil; ok {
					cancel(signalError(message.Name))
				}
			case "eow@openssh.com":
				once.Do(func() { close(broken) })
			case "window-change":
			default:
				ok = false
			}
			if request.WantReply {
				_ = request.Reply(ok, nil)
			}
		}
		select {
		case <-over:
		default:
			cancel(signalError("HUP"))
		}
	}()
	status := g.run(ctx, p)
	close(over)
	g.machine.cpu.step()
	if status.signal != "" {
		_, _ = channel.SendRequest("exit-signal", false, ssh.Marshal(struct {
			Name       string
			CoreDumped bool
			Message    string
			Language   string
		}{Name: status.signal}))
		return
	}
	_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{uint32(status.code)}))
}

// forward connects a channel to a port of the guest's, or beyond its network.
func (g *guest) forward(newChannel ssh.NewChannel) {
	var to struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}
	if err := ssh.Unmarshal(newChannel.ExtraData(), &to); err != nil {
		refuse(newChannel, err)
		return
	}
	conn, err := g.network.dial(context.Background(), net.JoinHostPort(to.Host, strconv.Itoa(int(to.Port))))
	if err != nil {
		refuse(newChannel, err)
		return
	}
	plain.Join(newChannel, conn)
}
