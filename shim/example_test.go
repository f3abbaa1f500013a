package shim_test

import (
	"context"
	"fmt"
	"os"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
	"github.com/smolvm/smolvm/shim"
)

// A program that runs VMs without the smolvm program.
func Example() {
	shim.Main() // does not return in the process beside a VM

	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{Embedded: true})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	defer func() { _ = m.Close() }() // VMs go on running
	result, err := m.Run(ctx, smolvm.VMConfig{}, smolvm.Command{Args: []string{"uname", "-a"}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	fmt.Printf("%s", result.Stdout)
}
