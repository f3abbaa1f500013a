// Package shim makes a program the shim of the VMs that it starts, so that it needs no other
// program of smolvm's.
//
// Beside each running VM is a process, its shim, that outlives the one that started it. It is
// the smolvm command, or any program that calls [Main] first:
//
//	func main() {
//		shim.Main()
//		m, err := manager.Open(ctx, manager.Config{Embedded: true})
//		...
//	}
//
// A shim has the VM's network and its VMM's backend in it, which makes the program a few
// megabytes larger; package manager alone has not.
package shim

import (
	"context"
	"io"
	"os"
	"os/exec"

	"github.com/smolvm/smolvm/internal/shim/program"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker"
	"github.com/smolvm/smolvm/internal/vmm/qemu"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// Main makes this process a shim if it was started as one by a [manager.Manager] with the
// Embedded option, and ends it when the VM has ended. In any other process it does nothing.
// Call it first in main: before flags are parsed, and before anything is opened or printed.
//
// [manager.Manager]: https://pkg.go.dev/github.com/smolvm/smolvm/manager#Manager
func Main() { program.Main(backends()...) }

// Run makes this process the shim of one VM, as its orders say, and returns when the VM has
// ended and its end is written down; or it makes a template, or fills a pool. It is for
// programs that serve as ShimCommand by a command of their own. The orders are the process's
// standard input. An orderly end of the VM begins when ctx is done.
func Run(ctx context.Context, orders io.Reader) error {
	return program.Run(ctx, orders, backends()...)
}

// backends returns what this program can run VMs by. Root runs Firecracker in its jailer, if
// that is installed.
func backends() []vmm.Backend {
	var options firecracker.Options
	if os.Geteuid() == 0 {
		options.Jailer, _ = exec.LookPath(traits.JailerProgram)
	}
	return []vmm.Backend{firecracker.New(options), qemu.New(qemu.Options{})}
}
