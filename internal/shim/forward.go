package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// Forward is one port forward of a running VM.
type Forward struct {
	// Protocol is "tcp" or "udp". Empty: "tcp".
	Protocol smolvm.Protocol `json:"protocol,omitempty"`
	// Host is the address and port that is listened on.
	Host netip.AddrPort `json:"host"`
	// GuestPort is connected to.
	GuestPort int `json:"guest_port"`
}

// ForwardOf returns a port forward as a shim is told it.
func ForwardOf(f smolvm.PortForward) Forward {
	return Forward{Protocol: f.Protocol, Host: netip.AddrPortFrom(f.HostAddr, uint16(f.HostPort)), GuestPort: f.GuestPort}
}

// SSHForward returns the forward of a host's port to a guest's SSH server.
func SSHForward(addr netip.Addr, port int) Forward {
	return ForwardOf(smolvm.PortForward{Protocol: smolvm.TCP, HostAddr: addr, HostPort: port, GuestPort: wire.SSHPort})
}

// PortFree reports whether a host's port can be bound now. Another program may still take it
// before a VM starts.
func PortFree(protocol smolvm.Protocol, addr netip.Addr, port int) bool {
	listener, err := ForwardOf(smolvm.PortForward{Protocol: protocol, HostAddr: addr, HostPort: port}).Listen(context.Background())
	if err != nil {
		return false
	}
	_ = listener.Close()
	return true
}

// Listen binds the host port of a forward. The error matches [smolvm.ErrPortInUse] if
// another program has it.
func (f Forward) Listen(ctx context.Context) (io.Closer, error) {
	var config net.ListenConfig
	var listener io.Closer
	var err error
	if f.Protocol == smolvm.UDP {
		listener, err = config.ListenPacket(ctx, "udp", f.Host.String())
	} else {
		listener, err = config.Listen(ctx, "tcp", f.Host.String())
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s: %w by another program", f.Host, smolvm.ErrPortInUse)
	}
	if err != nil {
		return nil, err
	}
	return listener, nil
}
