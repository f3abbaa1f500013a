// Package manager creates, starts, uses and deletes VMs. It is the entry to
// smolvm as a library.
//
//	m, err := manager.Open(ctx, manager.Config{})
//	if err != nil { ... }
//	defer m.Close() // VMs go on running
//
//	info, err := m.Create(ctx, smolvm.VMConfig{ID: "web"}, smolvm.CreateOptions{})
//	vm := m.VM(info.ID)
//	_, err = vm.Start(ctx, smolvm.StartOptions{})
//	out, err := vm.Output(ctx, "uname", "-a")
//	err = vm.Delete(ctx, smolvm.DeleteOptions{})
//
// [Manager] implements [smolvm.Service]; the package comment of smolvm says what options,
// errors and contexts mean, and which calls wait for each other.
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
// "smolvm-shim"); it is found beside the running program or in PATH, or named by
// [Config]. VMs outlive the process that started them.
//
// # Errors
//
// A call that fails leaves nothing behind but, for a VM that could not be started, its
// console log.
package manager
