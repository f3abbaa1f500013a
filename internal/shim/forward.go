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
