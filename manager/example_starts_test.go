package manager_test

import (
	"context"
	"fmt"
	"os"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

// What takes long is done once, in a parent. Each child goes on from there with a disk
// and a memory of its own, and the parent goes on too.
func ExampleManager_Fork() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	parent, err := m.Create(ctx, smolvm.VMConfig{}, smolvm.CreateOptions{})
	check(err)
	_, err = m.Start(ctx, parent.ID, smolvm.StartOptions{})
	check(err)
	_, err = m.Exec(ctx, parent.ID, smolvm.Command{Args: []string{"sh", "-c", "seq 1 1000 > /root/work"}})
	check(err)
	forked, err := m.Fork(ctx, parent.ID, smolvm.ForkOptions{Count: 2})
	check(err)
	for _, child := range forked.Children {
		_, err = m.Exec(ctx, child.ID, smolvm.Command{
			Args:   []string{"sh", "-c", "wc -l < /root/work; rm /root/work"},
			Stdout: os.Stdout,
		})
		check(err)
		check(m.Delete(ctx, child.ID, smolvm.DeleteOptions{}))
	}
	check(m.Delete(ctx, parent.ID, smolvm.DeleteOptions{}))
}

// A snapshot outlives the VM that it was taken of, and comes back under the same id.
func ExampleManager_CreateSnapshot() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	_, err = m.Create(ctx, smolvm.VMConfig{ID: "db"}, smolvm.CreateOptions{})
	check(err)
	_, err = m.Start(ctx, "db", smolvm.StartOptions{})
	check(err)
	_, err = m.Exec(ctx, "db", smolvm.Command{Args: []string{"sh", "-c", "echo loaded > /tmp/in-memory"}})
	check(err)
	_, err = m.CreateSnapshot(ctx, "db", smolvm.SnapshotOptions{Name: "db-loaded"})
	check(err)
	check(m.Delete(ctx, "db", smolvm.DeleteOptions{}))

	db, err := m.RestoreSnapshot(ctx, "db-loaded", smolvm.RestoreOptions{})
	check(err)
	_, err = m.Exec(ctx, db.ID, smolvm.Command{Args: []string{"cat", "/tmp/in-memory"}, Stdout: os.Stdout})
	check(err)
	fmt.Println(db.ID, db.Start.Method)
	check(m.Delete(ctx, db.ID, smolvm.DeleteOptions{}))
	check(m.RemoveSnapshot(ctx, "db-loaded"))
}

// VMs that are ready before they are asked for, with a command behind them.
func ExampleManager_SetPool() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	warmUp := "echo warm > /tmp/state"
	pool, err := m.SetPool(ctx, smolvm.PoolOptions{Size: 1, WarmUp: warmUp})
	check(err)
	vm, err := m.Create(ctx, smolvm.VMConfig{WarmUp: warmUp}, smolvm.CreateOptions{})
	check(err)
	vm, err = m.Start(ctx, vm.ID, smolvm.StartOptions{})
	check(err)
	_, err = m.Exec(ctx, vm.ID, smolvm.Command{Args: []string{"cat", "/tmp/state"}, Stdout: os.Stdout})
	check(err)
	fmt.Println(vm.Start.Method)
	check(m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}))
	check(m.RemovePool(ctx, pool.ID))
}
