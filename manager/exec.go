package manager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/store"
)

// Exec runs a command in the guest and returns how it ended. The error is nil
// however the command ended; it says that the command could not be run, or that the
// connection to the guest was lost. When ctx is done, the command and all that it has
// started is killed, and Exec returns within about a second, whatever the guest, the
// command's reader and its writers do.
//
// The error matches [smolvm.ErrInvalidState] if the VM does not run, and
// [smolvm.ErrUnsupported] if no agent is in the guest.
func (m *Manager) Exec(ctx context.Context, id string, command smolvm.Command) (smolvm.ExitStatus, error) {
	if err := command.Validate(); err != nil {
		return smolvm.ExitStatus{}, vmError("run a command in", id, err)
	}
	client, vm, err := m.clientAndRow(ctx, id, "run a command in")
	if err != nil {
		return smolvm.ExitStatus{}, err
	}
	status, err := client.Exec(ctx, placed(command, vm))
	status.EgressRevision = vm.EgressRevision
	if err != nil {
		return status, vmError(fmt.Sprintf("run %q in", command.Args[0]), id, err)
	}
	return status, nil
}

// placed returns a command with the directory and the user that a VM's configuration has for
// commands which name none.
func placed(command smolvm.Command, vm store.VM) smolvm.Command {
	command.Dir = cmp.Or(command.Dir, vm.Config.WorkingDir)
	command.User = cmp.Or(command.User, vm.Config.User)
	return command
}

// StartProcess starts a command in the guest and returns when it runs. Ctx is of the start
// only: the process goes on until it ends, is sent [smolvm.SignalKill], or the Manager is
// closed. A command that can't be started is a process that has ended with status 126 or 127,
// as with [Manager.Exec], whose errors are those of this call too.
func (m *Manager) StartProcess(ctx context.Context, id string, command smolvm.Command) (smolvm.Process, error) {
	if err := command.Validate(); err != nil {
		return nil, vmError("run a command in", id, err)
	}
	client, vm, err := m.clientAndRow(ctx, id, "run a command in")
	if err != nil {
		return nil, err
	}
	op := fmt.Sprintf("run %q in", command.Args[0])
	started, err := client.StartProcess(ctx, placed(command, vm))
	if err != nil {
		return nil, vmError(op, id, err)
	}
	return &process{Process: started, id: id, op: op, egressRevision: vm.EgressRevision}, nil
}

// process is a process whose errors name its VM.
type process struct {
	*agent.Process
	id, op string

	egressRevision int64 // of the policy when it was started
}

// Wait implements [smolvm.Process].
func (p *process) Wait(ctx context.Context) (smolvm.ExitStatus, error) {
	status, err := p.Process.Wait(ctx)
	if err == nil {
		status.EgressRevision = p.egressRevision
	}
	return status, vmError(p.op, p.id, err)
}

// Dial connects to an address as the guest sees it: "tcp" to a host and port, such
// as the guest's own "127.0.0.1:8080", or "unix" to a socket's path. In a guest
// without an agent only ports of the guest itself can be reached, and only those
// that listen on its network address. The connection has deadlines and can be half
// closed; ctx is of the connecting only.
func (m *Manager) Dial(ctx context.Context, id, network, address string) (net.Conn, error) {
	vm, err := m.living(ctx, id, "connect into")
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	if vm.Config.UsesImage() {
		client, err := m.clientOf(vm)
		if err != nil {
			return nil, err
		}
		conn, err = client.Dial(ctx, network, address)
		if err != nil {
			return nil, vmError("connect to "+address+" in", id, err)
		}
		return conn, nil
	}
	port, err := guestPort(network, address)
	if err == nil {
		conn, err = shim.NewClient(m.runtimeDir(id)).DialGuest(ctx, port)
	}
	if err != nil {
		return nil, vmError("connect to "+address+" in", id, err)
	}
	return conn, nil
}

func guestPort(network, address string) (int, error) {
	if network != "tcp" {
		return 0, fmt.Errorf("%w: a VM without an agent can be reached by tcp only, not by %s", smolvm.ErrUnsupported, network)
	}
	_, text, err := net.SplitHostPort(address)
	if err != nil {
		return 0, err
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("port %q is not a number from 1 to 65535", text)
	}
	return int(port), nil
}

// guests are the connections to the agents of VMs; it implements [start.Guests].
type guests struct{ *Manager }

// Ready implements [start.Guests].
func (g guests) Ready(ctx context.Context, vm store.VM) error {
	client, err := g.clientOf(vm)
	if err != nil {
		return err
	}
	return client.Ready(ctx)
}

// Forget implements [start.Guests].
func (g guests) Forget(id string) { g.forgetClient(id) }

// guestClient calls the agent in one run of a VM.
type guestClient struct {
	*agent.Client
	run string
	// older was replaced, as the guest had not answered in it. What runs over it goes on.
	older *guestClient
}

func (c *guestClient) close() {
	for ; c != nil; c = c.older {
		_ = c.Close()
	}
}

// living looks up a VM that must be running.
func (m *Manager) living(ctx context.Context, id, verb string) (store.VM, error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return vm, err
	}
	if vm.State != smolvm.StateRunning {
		return vm, stateError(verb, vm)
	}
	return vm, nil
}

// client returns a connection to the agent of a running VM.
func (m *Manager) client(ctx context.Context, id, verb string) (*guestClient, error) {
	client, _, err := m.clientAndRow(ctx, id, verb)
	return client, err
}

// clientAndRow is client, with what is written down of the VM.
func (m *Manager) clientAndRow(ctx context.Context, id, verb string) (*guestClient, store.VM, error) {
	vm, err := m.living(ctx, id, verb)
	if err != nil {
		return nil, vm, err
	}
	if !vm.Config.UsesImage() {
		return nil, vm, &smolvm.Error{Op: verb, Kind: "VM", ID: id,
			Hint: fmt.Sprintf("log in by SSH, if the guest has a server: `smolvm ssh %s`", id),
			Err:  fmt.Errorf("%w: it boots a kernel of its own, without smolvm's agent", smolvm.ErrUnsupported)}
	}
	client, err := m.clientOf(vm)
	return client, vm, err
}

// clientOf returns the client that there is of a VM's run, or makes one. Of two that are
// made at the same time one is kept.
func (m *Manager) clientOf(vm store.VM) (*guestClient, error) {
	m.mu.Lock()
	client := m.clients[vm.ID]
	m.mu.Unlock()
	if client != nil && client.run == vm.Run && client.Usable() {
		return client, nil
	}
	client, err := m.connect(vm)
	if err != nil {
		return nil, vmError("connect to the agent of", vm.ID, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		client.close()
		return nil, fmt.Errorf("connect to the agent of VM %q: %w", vm.ID, net.ErrClosed)
	}
	other := m.clients[vm.ID]
	switch {
	case other == nil:
	case other.run != vm.Run:
		other.close()
	case other.Usable():
		client.close()
		return other, nil
	default:
		client.older = other.unfinished()
	}
	m.clients[vm.ID] = client
	return client, nil
}

// unfinished drops the connections that have ended from those that were replaced.
func (c *guestClient) unfinished() *guestClient {
	for c != nil && c.ended() {
		c = c.older
	}
	if c != nil {
		c.older = c.older.unfinished()
	}
	return c
}

func (c *guestClient) ended() bool {
	select {
	case <-c.Done():
		return true
	default:
		return false
	}
}

func (m *Manager) connect(vm store.VM) (*guestClient, error) {
	signer, err := m.clientSigner()
	if err != nil {
		return nil, err
	}
	key, err := identity.PublicHostKey(vm.HostKey)
	if err != nil {
		return nil, err
	}
	shimClient := shim.NewClient(m.runtimeDir(vm.ID))
	client := agent.NewClient(agent.ClientConfig{
		Dial:    shimClient.DialAgent,
		Lost:    func(began time.Time) error { return whyLost(shimClient, began) },
		User:    "root",
		Signer:  signer,
		HostKey: key,
	})
	return &guestClient{Client: client, run: vm.Run}, nil
}

// lostTime bounds how long a shim may take to say why a connection was lost.
const lostTime = 2 * time.Second

// whyLost asks a shim why a call has lost its connection; nil if it does not know.
func whyLost(client *shim.Client, began time.Time) error {
	ctx, cancel := context.WithTimeout(context.Background(), lostTime)
	defer cancel()
	status, err := client.Status(ctx)
	if end := status.ChannelEnd; err == nil && end != nil && end.At.After(began) {
		return errors.New(end.Why)
	}
	return nil
}

// forgetClient closes the connection to a VM that is about to end.
func (m *Manager) forgetClient(id string) {
	m.mu.Lock()
	client := m.clients[id]
	delete(m.clients, id)
	m.mu.Unlock()
	if client != nil {
		client.close()
	}
}
