package start

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

// bind binds the host ports of the VM. One that another program has taken since it was reserved moves
// on, that of SSH too; one that the user named is an error then.
func (s *Starter) bind(ctx context.Context, vm *store.VM) ([]boundForward, error) {
	var bound []boundForward
	if vm.SSHPort == 0 { // its network mode has no forwards
		return nil, nil
	}
	sshListener, port, err := listen(ctx, shim.SSHForward(vm.Config.SSHHostAddr, vm.SSHPort), func(free store.PortFree) (int, error) {
		return s.Store.Ports().MoveSSH(ctx, vm.ID, free)
	})
	if err != nil {
		return nil, &smolvm.NetworkError{ID: vm.ID, Op: "forward SSH", Err: err}
	}
	vm.SSHPort = port
	bound = append(bound, boundForward{sshListener, shim.SSHForward(vm.Config.SSHHostAddr, port)})
	for i, forward := range vm.Forwards {
		listener, port, err := listen(ctx, shim.ForwardOf(forward), func(free store.PortFree) (int, error) {
			return s.Store.Ports().MoveForward(ctx, vm.ID, forward, free)
		})
		if err != nil {
			closeAll(bound)
			return nil, &smolvm.NetworkError{ID: vm.ID, Op: "forward " + forward.String(), Err: err}
		}
		vm.Forwards[i].HostPort = port
		bound = append(bound, boundForward{listener, shim.ForwardOf(vm.Forwards[i])})
	}
	return bound, nil
}

// listen listens on the host port of a forward, and returns it. If a program has taken it, move moves the
// forward to another, unless it may not, which is [smolvm.ErrNotFound].
func listen(ctx context.Context, forward shim.Forward, move func(store.PortFree) (int, error)) (io.Closer, int, error) {
	listener, err := forward.Listen(ctx)
	if err == nil || !errors.Is(err, smolvm.ErrPortInUse) {
		return listener, int(forward.Host.Port()), err
	}
	taken := err
	// The port that is found free stays bound from that moment on, so no other
	// program can take it before it is ours in the database as well.
	port, err := move(func(_ smolvm.Protocol, _ netip.Addr, port int) bool {
		forward.Host = netip.AddrPortFrom(forward.Host.Addr(), uint16(port))
		candidate, err := forward.Listen(ctx)
		if err != nil {
			return false
		}
		if listener != nil {
			_ = listener.Close()
		}
		listener = candidate
		return true
	})
	if err == nil {
		return listener, port, nil
	}
	if listener != nil {
		_ = listener.Close()
	}
	if errors.Is(err, smolvm.ErrNotFound) && !errors.Is(err, smolvm.ErrVMNotFound) {
		err = taken
	}
	return nil, 0, err
}

func closeAll(forwards []boundForward) {
	for _, forward := range forwards {
		_ = forward.listener.Close()
	}
}
