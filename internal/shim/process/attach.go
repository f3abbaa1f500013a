package process

import (
	"context"
	"fmt"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/tapnet"
	"github.com/smolvm/smolvm/internal/network/usernet"
)

// attach connects the VM as its configuration says, and warns of what the network can't do on
// this host. The error matches [smolvm.ErrUnsupported] if this build does not know the
// mode.
func (s *process) attach(config network.Config, warn func(string)) (network.Attachment, error) {
	switch mode := config.UsedMode(); mode {
	case network.TAP, network.Bridge:
		return s.attachTAP(config, warn)
	case smolvm.NetworkUser:
		n, err := usernet.New(config)
		if err != nil {
			return nil, err
		}
		warnOf(n.Problem(), warn)
		return s.recorded(n), nil // with the policy that is in the configuration
	default:
		return nil, &smolvm.Error{
			Hint: "start the VM with the smolvm that it was created with, or a newer one",
			Err:  fmt.Errorf("connect the VM: %w: network mode %q is not known to this shim", smolvm.ErrUnsupported, mode),
		}
	}
}

// attachTAP connects the VM by a TAP interface of the host.
func (s *process) attachTAP(config network.Config, warn func(string)) (network.Attachment, error) {
	owner, err := tapnet.OwnedBy(tapnet.DirectoryName(s.spec.Origin.DataDir), s.spec.ID)
	if err != nil {
		return nil, err
	}
	// Others who change networks are waited for, but not for ever.
	ctx, cancel := context.WithTimeout(context.Background(), attachTimeout)
	defer cancel()
	n, err := tapnet.New(ctx, config, owner)
	if err != nil {
		return nil, err
	}
	warnOf(n.Problem(), warn)
	return s.recorded(n), nil
}

// attachTimeout is far more than those who change networks before need.
const attachTimeout = 30 * time.Second

func warnOf(problem error, warn func(string)) {
	if problem != nil {
		warn(problem.Error())
	}
}
