package process

import (
	"context"
	"fmt"
	"os"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/vmm"
)

// freeze boots the VM, takes it through a login and commands, saves it when nobody talks to
// it any more, and ends it.
func (s *process) freeze(ctx context.Context, order shim.FreezeOrder) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-s.launcherGone:
			cancel(errGivenUp)
		case <-ctx.Done():
		}
	}()
	var u cleanupStack
	defer func() {
		u.run()
		if err != nil {
			s.report(shim.Report{Failure: shim.NewFailure(err)})
			return
		}
		s.report(shim.Report{PID: os.Getpid(), Start: startOf(os.Getpid())})
	}()
	if err := s.startNetwork(&u); err != nil {
		return err
	}
	u.add(s.kill)
	if err := s.bringUp(ctx); err != nil {
		return err
	}
	commands := make([]smolvm.Command, 0, len(order.Commands))
	for _, args := range order.Commands {
		commands = append(commands, smolvm.Command{Args: args})
	}
	if err := s.rehearse(ctx, commands); err != nil {
		return err
	}
	saver, ok := s.instance.(vmm.Saver)
	if !ok {
		return fmt.Errorf("save a guest: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend)
	}
	// The guest stays held: it is ended now.
	_, err = saver.Save(ctx, vmm.SaveOptions{Memory: order.Memory, State: order.State})
	return err
}
