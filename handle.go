package smolvm

import (
	"context"
	"fmt"
	"io"
	"net"
)

// VM is a handle of one VM: a [Service] with the id that each of its calls takes. It holds
// nothing, and need not be closed; the VM need not be there until a call is made. The zero
// value is of no use.
type VM struct {
	Service Service
	ID      string
}

// Info is [VMs.Get].
func (v VM) Info(ctx context.Context) (VMInfo, error) { return v.Service.Get(ctx, v.ID) }

// Start is [VMs.Start].
func (v VM) Start(ctx context.Context, opts StartOptions) (VMInfo, error) {
	return v.Service.Start(ctx, v.ID, opts)
}

// Stop is [VMs.Stop].
func (v VM) Stop(ctx context.Context, opts StopOptions) (VMInfo, error) {
	return v.Service.Stop(ctx, v.ID, opts)
}

// Delete is [VMs.Delete].
func (v VM) Delete(ctx context.Context, opts DeleteOptions) error {
	return v.Service.Delete(ctx, v.ID, opts)
}

// Usage is [VMs.Usage].
func (v VM) Usage(ctx context.Context) (Usage, error) { return v.Service.Usage(ctx, v.ID) }

// Pause is [VMs.Pause].
func (v VM) Pause(ctx context.Context) (VMInfo, error) { return v.Service.Pause(ctx, v.ID) }

// Resume is [VMs.Resume].
func (v VM) Resume(ctx context.Context) (VMInfo, error) { return v.Service.Resume(ctx, v.ID) }

// Wait is [VMs.Wait].
func (v VM) Wait(ctx context.Context, states ...VMState) (VMInfo, error) {
	return v.Service.Wait(ctx, v.ID, states...)
}

// Logs is [VMs.Logs].
func (v VM) Logs(ctx context.Context, opts LogOptions) (io.ReadCloser, error) {
	return v.Service.Logs(ctx, v.ID, opts)
}

// Exec is [Execs.Exec].
func (v VM) Exec(ctx context.Context, command Command) (ExitStatus, error) {
	return v.Service.Exec(ctx, v.ID, command)
}

// Output runs a command without a shell and returns what it wrote to its standard output.
// A command that fails is a [*ExitError], and its output is returned all the same.
func (v VM) Output(ctx context.Context, args ...string) ([]byte, error) {
	result, err := capture(ctx, v.Service, v.ID, Command{Args: args})
	if err == nil && !result.Success() {
		err = &Error{Op: fmt.Sprintf("run %q in", args[0]), Kind: "VM", ID: v.ID,
			Err: &ExitError{ExitStatus: result.ExitStatus, Stderr: result.Stderr}}
	}
	return result.Stdout, err
}

// StartProcess is [Execs.StartProcess].
func (v VM) StartProcess(ctx context.Context, command Command) (Process, error) {
	return v.Service.StartProcess(ctx, v.ID, command)
}

// Dial is [Execs.Dial].
func (v VM) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return v.Service.Dial(ctx, v.ID, network, address)
}

// CopyTo copies a file or a tree of the caller's host into the guest: [Files.Copy] with the
// usual options.
func (v VM) CopyTo(ctx context.Context, hostPath, guestPath string) error {
	return v.Service.Copy(ctx, CopyPath{Path: hostPath}, CopyPath{VM: v.ID, Path: guestPath}, CopyOptions{})
}

// CopyFrom copies a file or a tree of the guest to the caller's host: [Files.Copy] with the
// usual options.
func (v VM) CopyFrom(ctx context.Context, guestPath, hostPath string) error {
	return v.Service.Copy(ctx, CopyPath{VM: v.ID, Path: guestPath}, CopyPath{Path: hostPath}, CopyOptions{})
}

// PutTree is [Files.PutTree].
func (v VM) PutTree(ctx context.Context, path string, tree io.Reader, opts CopyOptions) error {
	return v.Service.PutTree(ctx, v.ID, path, tree, opts)
}

// GetTree is [Files.GetTree].
func (v VM) GetTree(ctx context.Context, path string, opts CopyOptions) (io.ReadCloser, error) {
	return v.Service.GetTree(ctx, v.ID, path, opts)
}

// ReadFile is [ReadFile] with the VM's service and id.
func (v VM) ReadFile(ctx context.Context, path string) ([]byte, error) {
	return ReadFile(ctx, v.Service, v.ID, path)
}

// WriteFile is [WriteFile] with the VM's service and id.
func (v VM) WriteFile(ctx context.Context, path string, content []byte, opts WriteOptions) error {
	return WriteFile(ctx, v.Service, v.ID, path, content, opts)
}

// AddPortForward is [Ports.AddPortForward].
func (v VM) AddPortForward(ctx context.Context, forward PortForward) (PortForward, error) {
	return v.Service.AddPortForward(ctx, v.ID, forward)
}

// SetEgress is [Egress.SetEgress].
func (v VM) SetEgress(ctx context.Context, policy EgressPolicy) (EgressState, error) {
	return v.Service.SetEgress(ctx, v.ID, policy)
}

// Snapshot is [Snapshots.CreateSnapshot].
func (v VM) Snapshot(ctx context.Context, opts SnapshotOptions) (Snapshot, error) {
	return v.Service.CreateSnapshot(ctx, v.ID, opts)
}

// Fork is [Snapshots.Fork], with handles of the children.
func (v VM) Fork(ctx context.Context, opts ForkOptions) ([]VM, error) {
	forked, err := v.Service.Fork(ctx, v.ID, opts)
	if err != nil {
		return nil, err
	}
	children := make([]VM, len(forked.Children))
	for i, child := range forked.Children {
		children[i] = VM{Service: v.Service, ID: child.ID}
	}
	return children, nil
}

// Changes is [Files.Changes].
func (v VM) Changes(ctx context.Context) ([]Change, error) { return v.Service.Changes(ctx, v.ID) }

// Apply is [Files.Apply].
func (v VM) Apply(ctx context.Context, opts ApplyOptions) ([]Change, error) {
	return v.Service.Apply(ctx, v.ID, opts)
}
