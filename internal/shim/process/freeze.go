package process

import (
	"context"
	"os"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
)

// freeze boots the VM, takes it through a login and commands, saves it when nobody talks to
// it any more, and ends it.
func (s *process) freeze(ctx context.Context, order shim.FreezeOrder) error {
	ctx, cancel := s.starting(ctx)
	defer cancel()
	var commands []smolvm.Command
	for _, args := range order.Commands {
		commands = append(commands, smolvm.Command{Args: args})
	}
	err := s.rehearsed(ctx, commands)
	if err == nil {
		err = s.session.SaveLast(ctx, order.Memory, order.State)
	}
	s.session.Close()
	if err != nil {
		s.launcher.report(shim.Report{Failure: shim.NewFailure(err)})
		return err
	}
	s.launcher.report(shim.Report{PID: os.Getpid(), Start: startOf(os.Getpid())})
	return nil
}

// rehearsed brings a VM up that nobody has asked for yet, and takes it through a login and
// commands.
func (s *process) rehearsed(ctx context.Context, commands []smolvm.Command) error {
	if err := s.session.Connect(); err != nil {
		return err
	}
	if err := s.session.Boot(ctx); err != nil {
		return err
	}
	return s.session.Rehearse(ctx, commands)
}
