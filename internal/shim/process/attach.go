package process

import (
	"fmt"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/usernet"
)

// attach connects a VM as its configuration says, and warns of what the network can't do on
// this host. The error matches [smolvm.ErrUnsupported] if this build does not know the
// mode.
func attach(config network.Config, warn func(string)) (network.Attachment, error) {
	switch mode := config.UsedMode(); mode {
	case smolvm.NetworkUser:
		n, err := usernet.New(config)
		if err != nil {
			return nil, err
		}
		if problem := n.Problem(); problem != nil {
			warn(problem.Error())
		}
		return n, nil // with the policy that is in the configuration
	default:
		return nil, &smolvm.Error{
			Hint: "start the VM with the smolvm that it was created with, or a newer one",
			Err:  fmt.Errorf("connect the VM: %w: network mode %q is not known to this shim", smolvm.ErrUnsupported, mode),
		}
	}
}
