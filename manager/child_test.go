package manager_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

// childCommand makes this test's program another user of the same data directory.
const childCommand = "child"

// childWork are things that a child may do besides creating and starting a VM, each in
// the middle of which it may be killed.
var childWork = map[string]func(ctx context.Context, m *manager.Manager, id string) error{
	"snapshot": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.CreateSnapshot(ctx, id, smolvm.SnapshotOptions{Name: "taken"})
		return err
	},
	"fork": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.Fork(ctx, id, smolvm.ForkOptions{IDs: []string{"forked"}})
		return err
	},
	"restore": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.RestoreSnapshot(ctx, id, smolvm.RestoreOptions{ID: "restored"})
		return err
	},
	"template": func(ctx context.Context, m *manager.Manager, _ string) error {
		_, err := m.BuildTemplate(ctx, smolvm.TemplateOptions{})
		return err
	},
	"pool": func(ctx context.Context, m *manager.Manager, _ string) error {
		_, err := m.SetPool(ctx, smolvm.PoolOptions{Size: 2})
		return err
	},
	"create": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.Create(ctx, smolvm.VMConfig{ID: id}, smolvm.CreateOptions{})
		return err
	},
	"stop": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.Stop(ctx, id, smolvm.StopOptions{})
		return err
	},
	"rm": func(ctx context.Context, m *manager.Manager, id string) error {
		return m.Delete(ctx, id, smolvm.DeleteOptions{})
	},
	"pause": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.Pause(ctx, id)
		return err
	},
	"resume": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.Resume(ctx, id)
		return err
	},
	"restore in place": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.RestoreSnapshot(ctx, id, smolvm.RestoreOptions{InPlace: true})
		return err
	},
	"empty pool": func(ctx context.Context, m *manager.Manager, _ string) error {
		pools, err := m.Pools(ctx)
		if err != nil {
			return err
		}
		return m.RemovePool(ctx, pools[0].ID)
	},
	"resize": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.Resize(ctx, id, smolvm.ResizeOptions{DiskSizeMiB: grown})
		return err
	},
	"add port": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.AddPortForward(ctx, id, smolvm.PortForward{HostAddr: childAddr(), GuestPort: webPort})
		return err
	},
	"set policy": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.SetEgress(ctx, id, smolvm.EgressPolicy{Default: smolvm.EgressDeny})
		return err
	},
	"remove port": func(ctx context.Context, m *manager.Manager, id string) error {
		forwards, err := m.PortForwards(ctx, id)
		if err != nil {
			return err
		}
		return m.RemovePortForward(ctx, id, forwards[0])
	},
	"build image": func(ctx context.Context, m *manager.Manager, name string) error {
		_, err := m.BuildImage(ctx, ownImage(m, name))
		return err
	},
	"commit image": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.CommitImage(ctx, id, "app", smolvm.CommitOptions{})
		return err
	},
	"remove image": func(ctx context.Context, m *manager.Manager, name string) error { return m.RemoveImage(ctx, name) },
	"prune images": func(ctx context.Context, m *manager.Manager, _ string) error {
		_, err := m.PruneImages(ctx)
		return err
	},
	"remove snapshot": func(ctx context.Context, m *manager.Manager, name string) error { return m.RemoveSnapshot(ctx, name) },
	"prune templates": func(ctx context.Context, m *manager.Manager, _ string) error {
		_, err := m.PruneTemplates(ctx, smolvm.PruneTemplateOptions{All: true})
		return err
	},
	"start": func(ctx context.Context, m *manager.Manager, id string) error {
		_, err := m.Start(ctx, id, smolvm.StartOptions{})
		return err
	},
}

// childAddr is an address of the host that no other process has ports of; see ownAddr.
func childAddr() netip.Addr {
	pid := os.Getpid()
	return netip.AddrFrom4([4]byte{127, 251, byte(pid >> 8), 1 + byte(pid)%250})
}

// childMain starts a VM, or does some other work, says so, and waits to be killed.
func childMain(args []string) int {
	ctx := context.Background()
	config, err := as(manager.Config{
		DataDir: args[0], SocketDir: args[1], AgentPath: args[2],
		Templates: manager.TemplateConfig{Disabled: childWork[args[4]] == nil},
	})
	if err != nil {
		return 1
	}
	m, err := manager.Open(ctx, config)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if work := childWork[args[4]]; work != nil {
		fmt.Println("begun")
		if err := work(ctx, m, args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Println("done")
		_, _ = os.Stdin.Read(make([]byte, 1))
		return 0
	}
	vm, err := m.Create(ctx, smolvm.VMConfig{ID: args[3], Ephemeral: args[4] != "lasting"}, smolvm.CreateOptions{})
	fmt.Println("created")
	if err == nil && args[4] != "ephemeral-create-only" {
		_, err = m.Start(ctx, vm.ID, smolvm.StartOptions{})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("started")
	_, _ = os.Stdin.Read(make([]byte, 1))
	return 0
}
