package manager

import (
	"context"
	"errors"
	"io"
	"net/netip"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/store"
)

// boundForward is a port forward whose host port is held by this process, until
// the shim has taken it over.
type boundForward struct {
	listener io.Closer
	forward  shim.Forward
}

// listen binds the host ports of the VM. The SSH port moves on if another program
// has taken it since it was reserved; a port that the user named is an error then.
func (m *Manager) listen(ctx context.Context, vm *store.VM) ([]boundForward, error) {
	var bound []boundForward
	sshListener, err := m.listenSSH(ctx, vm)
	if err != nil {
		return nil, err
	}
	bound = append(bound, boundForward{sshListener, sshForward(vm.Config.SSHHostAddr, vm.SSHPort)})
	for _, forward := range vm.Forwards {
		forwarded := shimForward(forward)
		listener, err := forwarded.Listen(ctx)
		if err != nil {
			closeAll(bound)
			return nil, &smolvm.NetworkError{ID: vm.ID, Op: "forward " + forward.String(), Err: err}
		}
		bound = append(bound, boundForward{listener, forwarded})
	}
	return bound, nil
}

func (m *Manager) listenSSH(ctx context.Context, vm *store.VM) (io.Closer, error) {
	listener, err := sshForward(vm.Config.SSHHostAddr, vm.SSHPort).Listen(ctx)
	if err == nil {
		return listener, nil
	}
	if !errors.Is(err, smolvm.ErrPortInUse) {
		return nil, &smolvm.NetworkError{ID: vm.ID, Op: "forward SSH", Err: err}
	}
	// The port that is found free stays bound from that moment on, so no other
	// program can take it before it is ours in the database as well.
	port, err := m.store.MoveSSHPort(ctx, vm.ID, func(_ smolvm.Protocol, addr netip.Addr, port int) bool {
		candidate, err := sshForward(addr, port).Listen(ctx)
		if err != nil {
			return false
		}
		if listener != nil {
			_ = listener.Close()
		}
		listener = candidate
		return true
	})
	if err != nil {
		if listener != nil {
			_ = listener.Close()
		}
		return nil, &smolvm.NetworkError{ID: vm.ID, Op: "reserve SSH port", Err: err}
	}
	vm.SSHPort = port
	return listener, nil
}

func sshForward(addr netip.Addr, port int) shim.Forward {
	return shimForward(smolvm.PortForward{Protocol: smolvm.TCP, HostAddr: addr, HostPort: port, GuestPort: guestSSHPort})
}

func shimForward(f smolvm.PortForward) shim.Forward {
	return shim.Forward{Protocol: f.Protocol, Host: netip.AddrPortFrom(f.HostAddr, uint16(f.HostPort)), GuestPort: f.GuestPort}
}

// portFree reports whether a port can be bound now. Another program may still take
// it before the VM starts; Start then moves to another one.
func portFree(protocol smolvm.Protocol, addr netip.Addr, port int) bool {
	listener, err := shimForward(smolvm.PortForward{Protocol: protocol, HostAddr: addr, HostPort: port}).Listen(context.Background())
	if err != nil {
		return false
	}
	_ = listener.Close()
	return true
}

func closeAll(forwards []boundForward) {
	for _, forward := range forwards {
		_ = forward.listener.Close()
	}
}
