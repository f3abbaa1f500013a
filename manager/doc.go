// Package manager creates, starts, uses and deletes VMs. It is the entry to
// smolvm as a library.
//
//	m, err := manager.Open(ctx, manager.Config{})
//	if err != nil { ... }
//	defer m.Close() // VMs go on running
//
//	vm, err := m.Create(ctx, smolvm.VMConfig{ID: "web"})
//	vm, err = m.Start(ctx, vm.ID, manager.StartOptions{})
//	status, err := m.Exec(ctx, vm.ID, smolvm.Command{
//		Args:   []string{"uname", "-a"},
//		Stdout: os.Stdout,
//	})
//	err = m.Delete(ctx, vm.ID)
//
// # State
//
// There is no daemon. All that is known is in a data directory, which any number
// of processes may open at the same time: state in an SQLite database, disks,
// images, keys and logs beside it. Whatever a VM needs of its host (its lease, its
// SSH port) is reserved in the database before it is made, and released after it
// is gone, so nothing is lost or left behind when a process dies; see
// [Manager.Reconcile].
//
// A running VM has one small process of smolvm's own beside it, its shim, which
// is the parent of the VMM. The shim is another program (the CLI with the argument
// "shim"); it is found beside the running program or in PATH, or named by
// [Config]. VMs outlive the process that started them.
//
// # Errors
//
// Errors match the sentinels of package smolvm by errors.Is, and
// [*smolvm.ValidationError], [*smolvm.NetworkError] and
// [*smolvm.PrerequisiteError] by errors.As. A call that fails leaves nothing
// behind but, for a VM that could not be started, its console log.
//
// # Contexts
//
// A context bounds the call that it is given to. It never bounds the life of a
// VM.
package manager
