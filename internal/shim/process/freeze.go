package process

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/vmm"
)

// FreezeOptions are the options of [Freeze].
type FreezeOptions struct {
	// Spec of the VM to be frozen. It has no forwards, and nobody can reach it.
	Spec shim.Spec
	// Backends are what it can be run by.
	Backends []vmm.Backend
	// Commands are run in it before it is frozen.
	Commands []smolvm.Command
	// Save says where to.
	Save vmm.SaveOptions
}

// Freeze boots a VM in this process, takes it through a login and commands, saves it
// when nobody talks to it any more, and ends it.
func Freeze(ctx context.Context, opts FreezeOptions) error {
	s := &process{
		spec:         opts.Spec,
		opts:         Options{Backends: opts.Backends},
		log:          slog.New(slog.NewTextHandler(os.Stderr, nil)),
		began:        time.Now(),
		launcherGone: make(chan struct{}),
		halts:        newHalts(),
	}
	var u undos
	defer u.run()
	if err := s.startNetwork(&u); err != nil {
		return err
	}
	u.add(s.kill)
	if err := s.bringUp(ctx); err != nil {
		return err
	}
	if err := s.rehearse(ctx, opts.Commands); err != nil {
		return err
	}
	saver, ok := s.instance.(vmm.Saver)
	if !ok {
		return fmt.Errorf("save a guest: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend)
	}
	opts.Save.Hold = true
	_, err := saver.Save(ctx, opts.Save)
	return err
}
