// Package smolvm is the contract of smolvm: disposable, hardware-isolated virtual machines
// for code that nobody trusts. It has the nouns (VMs, images, snapshots, templates, pools,
// events), the options and results of every call, and the errors; it does nothing itself,
// and needs nothing but the standard library. Package manager does the work on this host:
//
//	m, err := manager.Open(ctx, manager.Config{})
//	if err != nil {
//		return err
//	}
//	defer m.Close() // VMs go on running
//
//	result, err := m.Run(ctx, smolvm.VMConfig{}, smolvm.Command{Args: []string{"uname", "-a"}})
//	if err != nil {
//		return err
//	}
//	fmt.Printf("%s: %s", result, result.Stdout)
//
// Or step by step, with a handle of a VM that stays:
//
//	info, err := m.Create(ctx, smolvm.VMConfig{ID: "web", MemoryMiB: 1024}, smolvm.CreateOptions{})
//	vm := m.VM(info.ID)
//	_, err = vm.Start(ctx, smolvm.StartOptions{})
//	err = vm.CopyTo(ctx, "src", "/root/src")
//	out, err := vm.Output(ctx, "ls", "/root/src")
//	err = vm.Delete(ctx, smolvm.DeleteOptions{})
//
// # Five names to begin with
//
//   - [VMConfig] says what a VM is to be; its zero value is a VM of the default image.
//   - [VM] is a handle of one VM, with everything that can be done to it.
//   - [Command] is a program to run in a guest, shaped like exec.Cmd.
//   - [Service] is all calls, as an interface of small ones; manager.Manager implements it.
//   - [Run] runs one command in a VM of its own, which is gone afterwards.
//
// # Options, results, units
//
// The zero value of every options struct, and of every field in it, stands for the default.
// Sizes have their unit in their name (MemoryMiB, DiskSizeMiB, MaxBytes). In JSON a duration
// is a number of milliseconds in a field that ends in "_ms", a time is RFC 3339 in UTC, and
// a size has its unit in its name or is in bytes.
//
// # Errors
//
// Errors match the sentinels of this package by errors.Is, and [*ValidationError],
// [*NetworkError] and [*PrerequisiteError] by errors.As, also when they come from another
// process. [CodeOf] names the kind of any error in a word that does not change, and [HintOf]
// says what to do about it. How a command in a guest ends is no error.
//
// # Contexts
//
// A context bounds the call that it is given to, and nothing else: no VM and no [Process]
// ends with it. A call returns soon after its context is done, whatever the guest does.
//
// # Concurrency
//
// A Service may be used by any number of goroutines, and several processes may use the same
// VMs at a time. Per noun:
//
//   - VMs: calls that change one VM (Start, Stop, Pause, Resume, Resize, Delete, port
//     forwards, CreateSnapshot, Fork) wait for each other, in the order of their coming. Stop
//     and Delete cut the others short when they have waited for their timeout. Calls on
//     different VMs don't wait for each other, but for a limit of starts at a time. Get and
//     List never wait. Of several Creates of one id one succeeds.
//   - Commands and processes: any number run in one VM at a time. Two of them may share a
//     writer only if that may be called by several goroutines; Stdout and Stderr of one
//     command may be the same writer. When a Service is closed its commands end.
//   - Files: any number of copies run at a time, also to the same target; a file is
//     replaced as a whole, and the last copy to end wins.
//   - Images and templates: of several builds of the same thing one does the work, and the
//     others wait for its result. Nothing is removed while it is used.
//   - Snapshots: a name is taken by the first that is complete. Restores of one snapshot run
//     side by side.
//   - Pools: one process fills a pool at a time; a VM in it is claimed by one start.
//   - Events: every call sees all that was written before it; watchers don't wait for each
//     other, and slow ones lose nothing.
//
// # Stability
//
// This is v0: names may change until version 1. Databases and snapshots of earlier versions
// are read.
package smolvm
