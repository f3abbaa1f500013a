package manager_test

import (
	"context"
	"fmt"
	"os"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

// childCommand makes this test's program another user of the same data directory.
const childCommand = "child"

// childMain starts a VM, says so, and waits to be killed.
func childMain(args []string) int {
	ctx := context.Background()
	self, err := os.Executable()
	if err != nil {
		return 1
	}
	m, err := manager.Open(ctx, manager.Config{
		DataDir: args[0], SocketDir: args[1], AgentPath: args[2], ShimCommand: []string{self, shimCommand},
		Templates: manager.TemplateConfig{Disabled: true},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	config := smolvm.VMConfig{ID: args[3], Ephemeral: args[4] != "lasting"}
	vm, err := m.Create(ctx, config)
	fmt.Println("created")
	if err == nil && args[4] != "ephemeral-create-only" {
		_, err = m.Start(ctx, vm.ID, manager.StartOptions{})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("started")
	_, _ = os.Stdin.Read(make([]byte, 1))
	return 0
}
