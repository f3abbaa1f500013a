package smolvm

import (
	"context"
	"errors"
	"time"
)

// removeTime bounds the removal of a VM after its command, for which a tenth of a second is
// usual.
const removeTime = 30 * time.Second

// Run runs one command in a VM of its own: it creates an ephemeral VM, starts it, runs the
// command and deletes the VM, whatever happens in between. What the command writes is in the
// result, unless the command has writers. How the command ended is no error; see [Result].
// What is run is [VMConfig.CommandLine]: a command without arguments is the image's own.
func Run(ctx context.Context, service Service, config VMConfig, command Command) (_ Result, err error) {
	if err := command.Validate(); err != nil && len(command.Args) > 0 {
		return Result{}, err // before anything is made
	}
	config.Ephemeral = true
	info, err := service.Create(ctx, config, CreateOptions{})
	if err != nil {
		return Result{}, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTime)
		defer cancel()
		if deleteErr := service.Delete(ctx, info.ID, DeleteOptions{}); !errors.Is(deleteErr, ErrVMNotFound) {
			err = errors.Join(err, deleteErr)
		}
	}()
	command.Args = info.Config.CommandLine(command.Args...)
	if err := command.Validate(); err != nil {
		return Result{}, err
	}
	if _, err := service.Start(ctx, info.ID, StartOptions{}); err != nil {
		return Result{}, err
	}
	return capture(ctx, service, info.ID, command)
}
