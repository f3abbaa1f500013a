package smolvm

import (
	"context"
	"io"
	"iter"
	"net"
)

// Service is all that can be done with VMs, wherever they are: package manager does it on
// this host. A function that needs less should ask for one of the small interfaces.
type Service interface {
	VMs
	Execs
	Files
	Ports
	Egress
	Flows
	Snapshots
	Images
	Templates
	Pools
	Events
	Hosts
}

// VMs is the life of VMs. Calls that change one VM wait for each other; Stop and Delete cut
// short what keeps them waiting for too long.
type VMs interface {
	// Create reserves all that a VM needs and makes its disk, but does not start it.
	Create(ctx context.Context, config VMConfig, opts CreateOptions) (VMInfo, error)
	// Start starts a VM that does not run, and returns when it is ready.
	Start(ctx context.Context, id string, opts StartOptions) (VMInfo, error)
	// Stop shuts a VM down. Stopping one that does not run does nothing.
	Stop(ctx context.Context, id string, opts StopOptions) (VMInfo, error)
	// Delete ends a VM and removes all that belongs to it.
	Delete(ctx context.Context, id string, opts DeleteOptions) error
	// Pause holds a running VM: its CPUs stop, its memory stays.
	Pause(ctx context.Context, id string) (VMInfo, error)
	// Resume lets a paused VM go on.
	Resume(ctx context.Context, id string) (VMInfo, error)
	// Usage returns what a VM that runs has taken of its host.
	Usage(ctx context.Context, id string) (Usage, error)
	// Resize makes the disk of a VM that does not run larger.
	Resize(ctx context.Context, id string, opts ResizeOptions) (VMInfo, error)
	// Get returns what is known of a VM.
	Get(ctx context.Context, id string) (VMInfo, error)
	// List returns the VMs that the options select, the oldest first.
	List(ctx context.Context, opts ListOptions) ([]VMInfo, error)
	// Wait returns when a VM is in one of some states, or, if none is named, when it does
	// not run. The error matches [ErrVMNotFound] if the VM is deleted meanwhile.
	Wait(ctx context.Context, id string, states ...VMState) (VMInfo, error)
	// WaitHealthy returns when the checks of a VM's health have found that it works. The error
	// matches [ErrUnhealthy] if they find that it does not, and [ErrInvalidState] if it does not
	// run or has no check.
	WaitHealthy(ctx context.Context, id string) (VMInfo, error)
	// Logs reads the guest's serial console.
	Logs(ctx context.Context, id string, opts LogOptions) (io.ReadCloser, error)
}

// Execs runs commands in guests. Any number may run in one guest at a time.
type Execs interface {
	// Exec runs a command and returns how it ended, which is no error.
	Exec(ctx context.Context, id string, command Command) (ExitStatus, error)
	// StartProcess starts a command and returns when it runs. Ctx is of the start only: the
	// process ends when it has done its work, is killed, or its Service is closed.
	StartProcess(ctx context.Context, id string, command Command) (Process, error)
	// Dial connects to an address as the guest sees it.
	Dial(ctx context.Context, id, network, address string) (net.Conn, error)
}

// Files copies files into guests and out of them.
type Files interface {
	// PutTree puts what is in a tar stream into a directory of the guest, which must exist.
	PutTree(ctx context.Context, id, path string, tree io.Reader, opts CopyOptions) error
	// GetTree returns a file or a tree of the guest as a tar stream. The caller closes it;
	// a read fails when ctx is done, and when the copy has failed.
	GetTree(ctx context.Context, id, path string, opts CopyOptions) (io.ReadCloser, error)
	// Copy copies a file or a tree between the caller's host and a VM, or two VMs.
	Copy(ctx context.Context, from, to CopyPath, opts CopyOptions) error
	// Changes lists what a guest has changed in directories of the host that it has as overlays,
	// and Apply brings it to the host.
	Changes(ctx context.Context, id string) ([]Change, error)
	Apply(ctx context.Context, id string, opts ApplyOptions) ([]Change, error)
}

// Ports forwards ports of the host to guests.
type Ports interface {
	// AddPortForward forwards a port of the host, and returns the forward with the port
	// that was chosen.
	AddPortForward(ctx context.Context, id string, forward PortForward) (PortForward, error)
	// RemovePortForward ends a forward. Only its host port and protocol matter.
	RemovePortForward(ctx context.Context, id string, forward PortForward) error
	// PortForwards lists a VM's forwards, without that of SSH.
	PortForwards(ctx context.Context, id string) ([]PortForward, error)
}

// Egress says what guests may reach.
type Egress interface {
	// Egress returns a VM's policy.
	Egress(ctx context.Context, id string) (EgressState, error)
	// SetEgress gives a VM another policy. If the VM runs, connections that it does not allow
	// have ended when this returns.
	SetEgress(ctx context.Context, id string, policy EgressPolicy) (EgressState, error)
	// TestEgress returns what a VM's policy says of a destination: NAME or ADDRESS, with or
	// without :PORT and /PROTOCOL, NAME=ADDRESS for a name that leads there, or a URL.
	TestEgress(ctx context.Context, id, destination string) (EgressVerdict, error)
}

// Flows tells what has passed between guests and the outside, and what was done in them.
type Flows interface {
	// Flows yields the records of a VM's flow log, the oldest first. An error is the last
	// that it yields; one that matches [ErrFlowLogChanged] says that the log is not as it was
	// written.
	Flows(ctx context.Context, id string, opts FlowOptions) iter.Seq2[FlowRecord, error]
	// LearnEgress returns the smallest policy that allows what a VM's flow log has.
	LearnEgress(ctx context.Context, id string, opts LearnOptions) (LearnedEgress, error)
}

// Snapshots saves VMs and makes VMs of what was saved.
type Snapshots interface {
	// CreateSnapshot saves a VM as it is at one moment. The VM goes on.
	CreateSnapshot(ctx context.Context, id string, opts SnapshotOptions) (Snapshot, error)
	// RestoreSnapshot makes a VM that goes on where a snapshot was taken.
	RestoreSnapshot(ctx context.Context, name string, opts RestoreOptions) (VMInfo, error)
	// Snapshots lists the snapshots, the oldest first.
	Snapshots(ctx context.Context) ([]Snapshot, error)
	// RemoveSnapshot removes a snapshot. VMs that were restored from it go on.
	RemoveSnapshot(ctx context.Context, name string) error
	// Fork makes children of a running VM: all of them, or none.
	Fork(ctx context.Context, id string, opts ForkOptions) (Forked, error)
}

// Images keeps what VMs boot.
type Images interface {
	// BuildImage builds an image, unless one of the same recipe is there.
	BuildImage(ctx context.Context, opts BuildOptions) (Image, error)
	// PullImage fetches an OCI image from its registry, and makes it bootable. Layers that are
	// there are not fetched again.
	PullImage(ctx context.Context, ref string, opts PullOptions) (Image, error)
	// BuildDockerfile builds an image from a Dockerfile. What was built before is used again,
	// step by step. What is wrong with the Dockerfile is a [*DockerfileError].
	BuildDockerfile(ctx context.Context, opts DockerfileOptions) (Image, error)
	// ImportImage takes OCI images from an archive, a layout or a daemon of docker or podman,
	// and makes them bootable.
	ImportImage(ctx context.Context, opts ImportOptions) ([]Image, error)
	// ExportImage writes an OCI image.
	ExportImage(ctx context.Context, ref string, opts ExportOptions) error
	// PushImage sends an OCI image to the registry of its name.
	PushImage(ctx context.Context, ref string, opts PushOptions) error
	// TagImage has another name mean an OCI image too.
	TagImage(ctx context.Context, ref, name string) (Image, error)
	// ImageHistory returns the steps by which an image was made, the earliest first.
	ImageHistory(ctx context.Context, ref string) ([]ImageStep, error)
	// BuildKernel builds a kernel for guests of the distribution's source, unless there is one of
	// the same source, configuration and compiler, and has images boot with it: the default one, and
	// those that are made of OCI images and packages. Its security updates are its user's to build.
	BuildKernel(ctx context.Context, opts KernelOptions) (Kernel, error)
	// ResetKernel has images boot with the distribution's kernel again.
	ResetKernel(ctx context.Context) error
	// CommitImage makes an image of a VM, and has a name mean it; an empty one is none.
	CommitImage(ctx context.Context, id, name string, opts CommitOptions) (Image, error)
	// Images lists the images, the oldest first.
	Images(ctx context.Context) ([]Image, error)
	// Image finds an image by name, digest, or the beginning of its digest.
	Image(ctx context.Context, ref string) (Image, error)
	// RemoveImage removes an image that nothing is based on.
	RemoveImage(ctx context.Context, ref string) error
	// PruneImages removes the images that nothing uses and that have no name.
	PruneImages(ctx context.Context) ([]Image, error)
}

// Templates keeps saved VMs that others are cloned from. They make themselves; see
// [StartMethod].
type Templates interface {
	// BuildTemplate makes the template of VMs of some kind now, unless there is one.
	BuildTemplate(ctx context.Context, opts TemplateOptions) (Template, error)
	// Templates lists the templates, the oldest first.
	Templates(ctx context.Context) ([]Template, error)
	// RemoveTemplate removes a template. VMs that were cloned from it go on.
	RemoveTemplate(ctx context.Context, id string) error
	// PruneTemplates removes templates that are of no use, and returns their ids.
	PruneTemplates(ctx context.Context, opts PruneTemplateOptions) ([]string, error)
}

// Pools keeps VMs ready to be handed out.
type Pools interface {
	// SetPool keeps VMs of some kind ready, and returns when they are. With equal options
	// it changes nothing; another size makes the pool larger or smaller.
	SetPool(ctx context.Context, opts PoolOptions) (Pool, error)
	// EnsurePool is SetPool that has the VMs made in the background.
	EnsurePool(ctx context.Context, opts PoolOptions) (Pool, error)
	// Pools lists the pools.
	Pools(ctx context.Context) ([]Pool, error)
	// RemovePool ends a pool, and the VMs in it that nobody has claimed.
	RemovePool(ctx context.Context, id string) error
}

// Events tells what has happened to VMs.
type Events interface {
	// Events lists the newest events, the newest last.
	Events(ctx context.Context, opts EventOptions) ([]Event, error)
	// Watch yields events as they happen, until ctx is done or the loop ends. An error is
	// the last that it yields.
	Watch(ctx context.Context, opts WatchOptions) iter.Seq2[Event, error]
}

// Hosts looks at the host that VMs run on.
type Hosts interface {
	// Backends lists the backends that are known, and whether each can run VMs here.
	Backends(ctx context.Context) ([]BackendInfo, error)
	// CheckPrerequisites looks at what a backend needs of the host. Empty: the usual one.
	CheckPrerequisites(ctx context.Context, backend string) ([]Finding, error)
	// CheckNetwork finds out what stops the packets of guests, by sending some.
	CheckNetwork(ctx context.Context) ([]Finding, error)
	// Reconcile makes what is written down agree with what is so, after processes or the
	// host have died, and returns the ids of VMs that have failed since the last call.
	Reconcile(ctx context.Context) ([]string, error)
	// SSH returns how the stock ssh client logs in to a VM.
	SSH(ctx context.Context, id string, opts SSHOptions) (SSHAccess, error)
}
