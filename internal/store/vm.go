package store

import (
	"context"
	"database/sql"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/smolvm/smolvm"
)

// VM holds the data that is kept of a VM.
type VM struct {
	ID    string
	State smolvm.VMState
	// Config is what was asked for.
	Config smolvm.VMConfig

	// Lease is the VM's index, from which its addresses follow.
	Lease int
	// SSHPort is the port at Config.SSHHostAddr that leads to the guest's SSH.
	SSHPort int
	// Forwards are the VM's port forwards, without that of SSH, in the order in
	// which they were added. All have a host port.
	Forwards []smolvm.PortForward

	// Pool is the network that the VM's address is in; not valid: it has none in a pool.
	Pool netip.Prefix

	// EgressRevision is that of Config.Egress; 0: the VM was never given a policy.
	// EgressWithin is the policy that none of this VM's may go beyond, as JSON; empty: there
	// is none.
	EgressRevision int64
	EgressWithin   string

	// Image is the digest of the VM's image; empty for a VM made from paths.
	Image   string
	Backend string
	// DiskPath is the root disk, LogPath keeps the guest's console.
	DiskPath, LogPath string
	// Layer is the disk of a snapshot that the VM's own was made over, or is to be. Empty:
	// that is the root file system of the image, or of the configuration.
	Layer string
	// MachineID and HostKey are the guest's identity: its /etc/machine-id, and the
	// private key of its SSH server in PEM.
	MachineID, HostKey string

	// Run is unique to the current or last start. Empty: it was never started.
	Run string
	// PID of the VMM and ShimPID of the shim in that run; they stay when it is over.
	// They mean nothing without PIDStart and ShimStart: when the processes started,
	// as in the 22nd field of /proc/pid/stat, in clock ticks since the host's boot
	// BootID.
	PID, ShimPID        int
	PIDStart, ShimStart uint64
	BootID              string
	// Accelerator of that run.
	Accelerator string
	// Cause says why that run ended, in words; empty while it goes on.
	Cause string

	// StartedAt and StoppedAt are the times of that run; zero if it has not started, or not
	// ended.
	CreatedAt, StartedAt, StoppedAt time.Time
}

// NewVM holds the data that is to be kept of a new VM.
type NewVM struct {
	// Config is the configuration with its defaults filled in.
	Config smolvm.VMConfig
	// These are as in [VM].
	Image, Backend, DiskPath, Layer, LogPath, MachineID, HostKey, EgressWithin string
	// Pool is as in [VM].
	Pool netip.Prefix
	// LastLease is the highest lease that it may have. Zero: that of the store.
	LastLease int
	// Base is the file that the disk is to be based on, which is Layer if that is not
	// empty; empty: none.
	Base string
	// PortFree reports whether no other program has a host port that no VM has. It is
	// asked about the ports that the store chooses, and must be quick. Nil: all
	// are free.
	PortFree PortFree
}

// PortFree reports whether a port at a host address can be bound. It is called within
// a transaction, so it must not use the store.
type PortFree func(protocol smolvm.Protocol, addr netip.Addr, port int) bool

// CreateVM makes the row of a VM, and reserves the lowest free lease, the lowest
// free port for SSH, and the host ports of its forwards. Where a forward leaves the
// host port open, the lowest free one is chosen.
//
// The error matches [smolvm.ErrVMAlreadyExists], [smolvm.ErrPortInUse] if another
// VM has the host port of a forward, or [ErrNoneFree].
func (s *Store) CreateVM(ctx context.Context, n NewVM) (VM, error) {
	vm := VM{
		ID:        n.Config.ID,
		State:     smolvm.StateCreated,
		Config:    n.Config,
		Image:     n.Image,
		Backend:   n.Backend,
		DiskPath:  n.DiskPath,
		Layer:     n.Layer,
		LogPath:   n.LogPath,
		MachineID: n.MachineID,
		HostKey:   n.HostKey,

		EgressWithin: n.EgressWithin,
		Pool:         n.Pool,
	}
	if n.Config.Egress != nil {
		vm.EgressRevision = 1
	}
	err := s.update(ctx, func(tx *sql.Tx) (err error) {
		vm.CreatedAt = s.opts.Now().UTC() // here, so that it agrees with the order of creation
		if vm.Lease, err = chooseLease(ctx, tx, s.opts.Leases.upTo(n.LastLease)); err != nil {
			return err
		}
		seq, err := s.insertVM(ctx, tx, vm)
		if err != nil {
			return err
		}
		if n.Base != "" {
			if err := s.Bases().insert(ctx, tx, n.DiskPath, n.Base); err != nil {
				return err
			}
		}
		if n.Config.Network.Mode.Forwards() {
			vm.SSHPort, vm.Forwards, err = s.insertPorts(ctx, tx, seq, n)
		}
		return err
	})
	if err != nil {
		return VM{}, err
	}
	return vm, nil
}

// GetVM reads a VM. The error matches [smolvm.ErrVMNotFound].
func (s *Store) GetVM(ctx context.Context, id string) (VM, error) {
	var vm VM
	err := s.query(ctx, oneVM, func(rows *sql.Rows) (err error) {
		vm, err = s.scanVM(rows, id)
		return err
	}, id)
	return vm, err
}

// minPart is the number of VMs from which on a transaction of its own to read them pays.
const minPart = 1000

// ListVMs reads all VMs in that state, or in any if it is empty, in the order in
// which they were created. Many of them are read in parts at the same time: each VM
// is as it was at one moment, but not all at the same.
func (s *Store) ListVMs(ctx context.Context, state smolvm.VMState) ([]VM, error) {
	var count, first, last int64
	err := s.view(ctx, func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, "SELECT count(*), ifnull(min(seq), 0), ifnull(max(seq), 0) FROM vms").
			Scan(&count, &first, &last)
	})
	if err != nil {
		return nil, err
	}
	parts := make([][]VM, min(maxReaders, 1+count/minPart))
	step := (last-first)/int64(len(parts)) + 1
	group, ctx := errgroup.WithContext(ctx)
	for i := range parts {
		from := first + int64(i)*step
		group.Go(func() error {
			return s.view(ctx, func(tx *sql.Tx) (err error) {
				parts[i], err = s.selectVMs(ctx, tx, int(count)/len(parts)+1,
					"WHERE seq BETWEEN ? AND ? AND (state = ? OR ? = '') ORDER BY seq", from, from+step-1, string(state), string(state))
				return err
			})
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return slices.Concat(parts...), nil
}

// DeleteVM removes a VM's row, and gives up its lease and ports. Its events stay.
// The error matches [smolvm.ErrVMNotFound].
func (s *Store) DeleteVM(ctx context.Context, id string) error {
	return s.updateDurably(ctx, func(tx *sql.Tx) error {
		// A disk that is retained still has its base.
		_, err := tx.ExecContext(ctx, `DELETE FROM bases WHERE path = (SELECT disk_path FROM vms
			WHERE id = ? AND json_extract(options, '$.retain_disk') IS NOT TRUE)`, id)
		if err != nil {
			return err
		}
		result, err := tx.ExecContext(ctx, "DELETE FROM vms WHERE id = ?", id)
		if err != nil {
			return err
		}
		n, err := result.RowsAffected()
		if err == nil && n == 0 {
			err = notFound(id)
		}
		return err
	})
}
