// Package workspace runs commands one after the other in a VM of its own, and has what each of
// them changed as a layer of an OCI image: what a Dockerfile's steps and the packages of a
// distribution are made by.
//
// The VM is ephemeral, and starts as any other of its image does, by a clone where there is a
// template. In it the image's root file system becomes the lowest directory of an overlay, by
// being renamed; each layer adds a directory to it, on the VM's own disk. A command sees the
// overlay as its root, and is in namespaces of its own, with which all that it leaves behind
// ends. So nothing is on the host that a killed process could leave but the VM, and nothing of a
// guest's files is ever a file of the host.
package workspace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
)

// VMs are what a workspace has its VM from.
type VMs interface {
	Create(ctx context.Context, config smolvm.VMConfig, opts smolvm.CreateOptions) (smolvm.VMInfo, error)
	Start(ctx context.Context, id string, opts smolvm.StartOptions) (smolvm.VMInfo, error)
	Delete(ctx context.Context, id string, opts smolvm.DeleteOptions) error
	// Guest returns the guest of a VM that runs.
	Guest(ctx context.Context, id string) (Guest, error)
}

// Guest is what a workspace asks of the guest's agent.
type Guest interface {
	Step(ctx context.Context, command smolvm.Command, step wire.StepRequest) (smolvm.ExitStatus, error)
	Layer(ctx context.Context, w io.Writer, request wire.LayerRequest) error
	PutLayer(ctx context.Context, archive io.Reader, request wire.PutRequest) error
}

// Options are the options of [Open]. The zero value is useful.
type Options struct {
	// VM says what the VM is like: CPUs, memory, disk, network, egress policy, backend, as in
	// [smolvm.VMConfig]. Its image is that of the workspace, and it is ephemeral.
	VM smolvm.VMConfig
	// Cold boots the VM from the beginning, and has no template made: for an image of which there
	// will be no other workspace.
	Cold bool
	// Limits bound each layer. Zeros are the defaults of package ocilayer.
	Limits ocilayer.Limits
	// Started is told how the VM was started; it may be nil.
	Started func(smolvm.StartReport)
}

// Workspace is a VM in which commands run one after the other. Its calls wait for each other.
type Workspace struct {
	vms    VMs
	guest  Guest
	id     string
	limits ocilayer.Limits

	mu     sync.Mutex // held while the guest does something
	failed error      // why the workspace is of no use any more
}

// closeTime bounds the removal of a VM that nobody waits for any more.
const closeTime = 30 * time.Second

// Open starts the VM of a workspace from an image. The caller closes the workspace.
func Open(ctx context.Context, vms VMs, image smolvm.Image, opts Options) (*Workspace, error) {
	config := opts.VM
	config.Image, config.Ephemeral = image.Digest, true
	info, err := vms.Create(ctx, config, smolvm.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("open a workspace of image %s: %w", image.Digest, err)
	}
	w := &Workspace{vms: vms, id: info.ID, limits: opts.Limits}
	info, err = vms.Start(ctx, info.ID, smolvm.StartOptions{Cold: opts.Cold})
	if err == nil {
		w.guest, err = vms.Guest(ctx, info.ID)
	}
	if err != nil {
		return nil, fmt.Errorf("open a workspace of image %s: %w", image.Digest, errors.Join(err, w.Close(ctx)))
	}
	if opts.Started != nil && info.Start != nil {
		opts.Started(*info.Start)
	}
	return w, nil
}

// ID returns the id of the workspace's VM.
func (w *Workspace) ID() string { return w.id }

// Close ends the workspace's VM, and removes all that belongs to it. It does so when ctx is done
// too, within half a minute.
func (w *Workspace) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTime)
	defer cancel()
	err := w.vms.Delete(ctx, w.id, smolvm.DeleteOptions{})
	if errors.Is(err, smolvm.ErrVMNotFound) {
		return nil
	}
	return err
}

// Command is a command that runs in a workspace.
type Command struct {
	// Args are the program and its arguments, as in [smolvm.Command].
	Args []string
	// Env is the command's environment, as "NAME=value". PATH has a default, and HOME is the
	// user's unless it is set.
	Env []string
	// Dir is the working directory, which must be there. Empty: the root.
	Dir string
	// User is as in [smolvm.Command]. Empty: root.
	User string

	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Signals are as in [smolvm.Command].
	Signals <-chan smolvm.Signal

	// NoNetwork leaves the command nothing but loopback. By default it has the VM's network.
	NoNetwork bool
	// Mounts are what only this command sees.
	Mounts []Mount
}

// Mount is a directory or a file that one command sees at Target, and that is part of no layer.
type Mount struct {
	// Area is what is mounted, as [Workspace.PutArea] has filled it. Empty: an empty file
	// system in the guest's memory.
	Area string
	// Source is a path in the area. Empty: the whole area.
	Source string
	// Target is an absolute path in the command's root. It is made if it is not there.
	Target   string
	ReadOnly bool
	// Size bounds a file system in memory, in bytes. Zero: half of the guest's memory.
	Size int64
}

// begin waits for the workspace. The caller calls end.
func (w *Workspace) begin() error {
	w.mu.Lock()
	if w.failed != nil {
		defer w.mu.Unlock()
		return fmt.Errorf("the workspace can't be used any more: %w", w.failed)
	}
	return nil
}

// end lets others have the workspace. After an error of an operation that leaves half of
// something it is of no use.
func (w *Workspace) end(err error) {
	if err != nil {
		w.failed = err
	}
	w.mu.Unlock()
}

// Run runs a command, and returns how it ended. What it has started and left behind is ended.
// A command that could not be started has ended with status 127, 126 or 125, and its stderr
// says why. When ctx is done, the command is killed; what it has changed stays.
func (w *Workspace) Run(ctx context.Context, command Command) (smolvm.ExitStatus, error) {
	inner := smolvm.Command{
		Args: command.Args, Env: command.Env, Dir: command.Dir, User: command.User,
		Stdin: command.Stdin, Stdout: command.Stdout, Stderr: command.Stderr, Signals: command.Signals,
	}
	if err := inner.Validate(); err != nil {
		return smolvm.ExitStatus{}, err
	}
	request := wire.StepRequest{NoNetwork: command.NoNetwork}
	for _, m := range command.Mounts {
		request.Mounts = append(request.Mounts, wire.StepMount{
			Area: m.Area, Source: []byte(m.Source), Target: []byte(m.Target), ReadOnly: m.ReadOnly, Size: m.Size,
		})
	}
	if err := w.begin(); err != nil {
		return smolvm.ExitStatus{}, err
	}
	defer w.end(nil)
	status, err := w.guest.Step(ctx, inner, request)
	if err != nil {
		err = fmt.Errorf("run %q in a workspace: %w", command.Args[0], err)
	}
	return status, err
}

// Layer writes what has changed since the last layer to out, as the archive of a layer that is
// not packed: an empty archive if nothing has. What is written before an error is of no use.
// With [io.Discard] the guest sends nothing, and what has changed is below the next layer.
func (w *Workspace) Layer(ctx context.Context, out io.Writer) error {
	if err := w.begin(); err != nil {
		return err
	}
	var err error
	if out == io.Discard {
		err = w.guest.Layer(ctx, nil, wire.LayerRequest{Discard: true})
	} else {
		err = w.take(ctx, out, wire.LayerRequest{})
	}
	if err != nil {
		err = fmt.Errorf("take a layer from a workspace: %w", err)
	}
	w.end(err)
	return err
}

// take reads an archive of the guest's, checks it, and passes it on.
func (w *Workspace) take(ctx context.Context, out io.Writer, request wire.LayerRequest) error {
	return Checked(ctx, out, w.limits, func(ctx context.Context, out io.Writer) error {
		return w.guest.Layer(ctx, out, request)
	})
}

// Put unpacks the archive of a layer in a directory of the workspace, which is made if it is not
// there: with owners, modes and extended attributes, and what it hides is removed. It is part of
// the next layer. Entries that make a directory opaque come before what the layer has in it.
func (w *Workspace) Put(ctx context.Context, path string, archive io.Reader) error {
	return w.put(ctx, archive, wire.PutRequest{Path: []byte(path)})
}

func (w *Workspace) put(ctx context.Context, archive io.Reader, request wire.PutRequest) error {
	if err := w.begin(); err != nil {
		return err
	}
	err := w.guest.PutLayer(ctx, archive, request)
	if err != nil {
		err = fmt.Errorf("put files into a workspace: %w", err)
	}
	w.end(err)
	return err
}

// PutArea unpacks an archive in an area beside the root file system, for [Mount]. The name has
// letters a-z, digits and hyphens. What is in an area in memory is never on a disk.
func (w *Workspace) PutArea(ctx context.Context, name string, inMemory bool, archive io.Reader) error {
	return w.put(ctx, archive, wire.PutRequest{Area: name, Memory: inMemory})
}

// Area writes what is in an area to out, as an archive.
func (w *Workspace) Area(ctx context.Context, name string, out io.Writer) error {
	if err := w.begin(); err != nil {
		return err
	}
	defer w.end(nil) // it is as it was
	if err := w.take(ctx, out, wire.LayerRequest{Area: name}); err != nil {
		return fmt.Errorf("take area %s from a workspace: %w", name, err)
	}
	return nil
}

// DropArea removes an area.
func (w *Workspace) DropArea(ctx context.Context, name string) error {
	return w.put(ctx, nil, wire.PutRequest{Area: name, Drop: true})
}
