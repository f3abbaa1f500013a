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

// bind binds the host ports of the VM. The SSH port moves on if another program
// has taken it since it was reserved; a port that the user named is an error then.
func (s *Starter) bind(ctx context.Context, vm *store.VM) ([]boundForward, error) {
	var bound []boundForward
	if vm.SSHPort == 0 { // its network mode has no forwards
		return nil, nil
	}
	sshListener, err := s.bindSSH(ctx, vm)
	if err != nil {
		return nil, err
	}
	bound = append(bound, boundForward{sshListener, shim.SSHForward(vm.Config.SSHHostAddr, vm.SSHPort)})
	for _, forward := range vm.Forwards {
		forwarded := shim.ForwardOf(forward)
		listener, err := forwarded.Listen(ctx)
		if err != nil {
			closeAll(bound)
			return nil, &smolvm.NetworkError{ID: vm.ID, Op: "forward " + forward.String(), Err: err}
		}
		bound = append(bound, boundForward{listener, forwarded})
	}
	return bound, nil
}

func (s *Starter) bindSSH(ctx context.Context, vm *store.VM) (io.Closer, error) {
	listener, err := shim.SSHForward(vm.Config.SSHHostAddr, vm.SSHPort).Listen(ctx)
	if err == nil {
		return listener, nil
	}
	if !errors.Is(err, smolvm.ErrPortInUse) {
		return nil, &smolvm.NetworkError{ID: vm.ID, Op: "forward SSH", Err: err}
	}
	// The port that is found free stays bound from that moment on, so no other
	// program can take it before it is ours in the database as well.
	port, err := s.Store.Ports().MoveSSH(ctx, vm.ID, func(_ smolvm.Protocol, addr netip.Addr, port int) bool {
		candidate, err := shim.SSHForward(addr, port).Listen(ctx)
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

func closeAll(forwards []boundForward) {
	for _, forward := range forwards {
		_ = forward.listener.Close()
	}
}
