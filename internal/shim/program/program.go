// Package program is what a program does that serves as shim. It is told on its standard
// input what to be: the shim of one VM, a worker that makes a template or fills a pool, or the
// launcher of a VMM that has namespaces of its own.
package program

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/namespace/launcher"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/shim/process"
	"github.com/smolvm/smolvm/internal/teardown"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/manager"
)

// Run makes this process what its orders say, and returns when that is over. SIGTERM and
// SIGINT are taken from now on: they, and ctx being done, end a VM in an orderly way. The
// backends are what the process can run VMs by.
func Run(ctx context.Context, orders io.Reader, backends ...vmm.Backend) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	reader := bufio.NewReader(orders)
	line, err := reader.ReadBytes('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read orders: %w", err)
	}
	var is struct {
		Task json.RawMessage `json:"task"`
		namespace.Orders
	}
	_ = json.Unmarshal(line, &is) // a shim says itself what is wrong with its orders
	if is.Launch != nil {
		stop() // signals are for the VMM
		return launcher.Run(*is.Launch)
	}
	orders = io.MultiReader(bytes.NewReader(line), reader)
	if is.Task != nil {
		return manager.RunWorker(ctx, orders, declared(backends)...)
	}
	return process.Main(ctx, process.Options{
		Stdin:    orders,
		Backends: backends,
		Exited:   teardown.RecordExit,
		Halted:   teardown.RecordHalt,
		Reached:  teardown.RecordReach,
		Healthy:  teardown.RecordHealth,
	})
}

// declarer is a backend that declares its traits by itself, as those that package traits lists
// of its name are not what it can do, or there are none.
type declarer interface{ Traits() vmm.Traits }

// declared returns what backends declare by themselves.
func declared(backends []vmm.Backend) []vmm.Traits {
	var all []vmm.Traits
	for _, backend := range backends {
		if d, ok := backend.(declarer); ok {
			all = append(all, d.Traits())
		}
	}
	return all
}

// Main is [Run] for a program that was started with [shim.Argument], and ends the process. In
// any other it does nothing.
func Main(backends ...vmm.Backend) {
	if len(os.Args) < 2 || os.Args[1] != shim.Argument {
		return
	}
	if err := Run(context.Background(), os.Stdin, backends...); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "shim:", err)
		os.Exit(1) //nolint:forbidigo // it is the main of a program that is somebody else's
	}
	os.Exit(0) //nolint:forbidigo // as above
}
