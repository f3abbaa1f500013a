package store

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	sqlite3 "modernc.org/sqlite/lib"

	"github.com/smolvm/smolvm"
)

// vmColumns are the columns of table vms, in the order of [row.fields].
const vmColumns = `seq, id, state, vcpus, memory_mib, image_name, options,
	lease, image, backend, disk_path, layer, log_path, machine_id, host_key, created_at,
	run, pid, pid_start, shim_pid, shim_start, boot_id, accelerator, cause, started_at, stopped_at,
	egress_revision, egress_within, pool`

// row is a row of table vms.
type row struct {
	VM
	seq     int64
	options string
	root    string // see [file]
}

// fields returns the row's fields in the order of [vmColumns], to be written from or
// read into.
func (r *row) fields() []any {
	return []any{
		number[int64]{&r.seq}, text[string]{&r.ID}, text[smolvm.VMState]{&r.State}, number[int]{&r.Config.VCPUs},
		number[int]{&r.Config.MemoryMiB}, text[string]{&r.Config.Image}, text[string]{&r.options},

		number[int]{&r.Lease}, text[string]{&r.Image}, text[string]{&r.Backend}, file{r.root, &r.DiskPath},
		file{r.root, &r.Layer}, file{r.root, &r.LogPath}, text[string]{&r.MachineID}, text[string]{&r.HostKey}, moment{&r.CreatedAt},

		text[string]{&r.Run}, number[int]{&r.PID}, number[uint64]{&r.PIDStart}, number[int]{&r.ShimPID},
		number[uint64]{&r.ShimStart}, text[string]{&r.BootID}, text[string]{&r.Accelerator}, text[string]{&r.Cause},
		moment{&r.StartedAt}, moment{&r.StoppedAt},

		number[int64]{&r.EgressRevision}, text[string]{&r.EgressWithin}, prefix{&r.Pool},
	}
}

// The values that column options leaves out. They are part of the schema: they must
// stay as they are even if the program's defaults change.
const (
	usualDiskMode = smolvm.DiskIsolated
	usualReady    = smolvm.ReadyAgent
	usualNetwork  = smolvm.NetworkUser
)

// packOptions returns what a configuration has beyond the columns, as JSON; empty
// if that is all as usual.
func packOptions(vm VM) (string, error) {
	c := vm.Config
	// These have columns; the address is that of the SSH port.
	c.ID, c.VCPUs, c.MemoryMiB, c.Image, c.SSHHostAddr = "", 0, 0, "", netip.Addr{}
	if c.Backend == vm.Backend {
		c.Backend = ""
	}
	if c.Hostname == vm.ID {
		c.Hostname = ""
	}
	if c.DiskMode == usualDiskMode {
		c.DiskMode = ""
	}
	if c.Ready == usualReady {
		c.Ready = ""
	}
	if c.Network.Mode == usualNetwork {
		c.Network.Mode = ""
	}
	if reflect.ValueOf(c).IsZero() {
		return "", nil
	}
	text, err := json.Marshal(c)
	return string(text), err
}

// unpacker completes the configurations of VMs whose columns have been read. Most VMs
// that follow each other have the same options, which it parses once.
type unpacker struct {
	options string
	config  smolvm.VMConfig // what options say
}

func (u *unpacker) unpack(vm *VM, options string) error {
	if options != u.options {
		*u = unpacker{options: options}
		if options != "" {
			if err := json.Unmarshal([]byte(options), &u.config); err != nil {
				return err
			}
		}
	}
	c := u.config
	// No two VMs share what a caller may change.
	c.Drives, c.PortForwards = slices.Clone(c.Drives), slices.Clone(c.PortForwards)
	c.Egress = c.Egress.Clone()
	c.AuthorizedKeys, c.Env, c.Labels = slices.Clone(c.AuthorizedKeys), maps.Clone(c.Env), maps.Clone(c.Labels)
	c.Entrypoint, c.Cmd = slices.Clone(c.Entrypoint), slices.Clone(c.Cmd)
	c.ID, c.VCPUs, c.MemoryMiB, c.Image = vm.ID, vm.Config.VCPUs, vm.Config.MemoryMiB, vm.Config.Image
	c.Backend = cmp.Or(c.Backend, vm.Backend)
	c.Hostname = cmp.Or(c.Hostname, vm.ID)
	c.DiskMode = cmp.Or(c.DiskMode, usualDiskMode)
	c.Ready = cmp.Or(c.Ready, usualReady)
	c.Network.Mode = cmp.Or(c.Network.Mode, usualNetwork)
	vm.Config = c
	return nil
}

// insertVM makes the row of a VM, and returns its number.
func (s *Store) insertVM(ctx context.Context, tx *sql.Tx, vm VM) (int64, error) {
	options, err := packOptions(vm)
	if err != nil {
		return 0, err
	}
	r := row{VM: vm, options: options, root: s.root} // seq is NULL: SQLite takes the next one
	fields := r.fields()
	result, err := tx.ExecContext(ctx,
		"INSERT INTO vms ("+vmColumns+") VALUES (?"+strings.Repeat(", ?", len(fields)-1)+")", fields...)
	// The lease is unique as well, but it was chosen in this transaction.
	if resultCode(err) == sqlite3.SQLITE_CONSTRAINT_UNIQUE {
		return 0, fmt.Errorf("%w: %q", smolvm.ErrVMAlreadyExists, vm.ID)
	}
	if err != nil {
		return 0, err
	}
	return result.LastInsertId()
}

// oneVM reads a VM, once for each of its ports. It is one statement: that is a transaction of
// its own, and a VM is read more often than anything else is done.
const oneVM = "SELECT v.*, ifnull(kind = 'ssh', false), protocol, host_addr, host_port, guest_port" +
	" FROM (SELECT " + vmColumns + " FROM vms WHERE id = ?) AS v LEFT JOIN ports ON vm = v.seq ORDER BY ports.seq"

// scanVM reads what [oneVM] finds.
func (s *Store) scanVM(rows *sql.Rows, id string) (VM, error) {
	r := row{root: s.root}
	var p port
	fields := append(r.fields(), p.fields()...)
	var addr netip.Addr
	found := false
	for rows.Next() {
		if err := rows.Scan(fields...); err != nil {
			return VM{}, err
		}
		found = true
		p.addTo(&r.VM)
		addr = r.Config.SSHHostAddr
	}
	switch err := rows.Err(); {
	case err != nil:
		return VM{}, err
	case !found:
		return VM{}, notFound(id)
	}
	if err := new(unpacker).unpack(&r.VM, r.options); err != nil {
		return VM{}, fmt.Errorf("read options of VM %q: %w", id, err)
	}
	r.Config.SSHHostAddr = addr
	return r.VM, nil
}

// selectVMs reads VMs with their ports. The clause says which, and in what order;
// count is how many there may be, if that is known.
func (s *Store) selectVMs(ctx context.Context, tx *sql.Tx, count int, clause string, args ...any) ([]VM, error) {
	rows, err := tx.QueryContext(ctx, "SELECT "+vmColumns+" FROM vms "+clause, args...)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	vms := make([]VM, 0, count)
	bySeq := make(map[int64]int, count)
	r := row{root: s.root} // one for all of them, and so one list of fields
	fields := r.fields()
	var options unpacker
	for rows.Next() {
		if err := rows.Scan(fields...); err != nil {
			return nil, err
		}
		if err := options.unpack(&r.VM, r.options); err != nil {
			return nil, fmt.Errorf("read options of VM %q: %w", r.ID, err)
		}
		bySeq[r.seq] = len(vms)
		vms = append(vms, r.VM)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	return vms, selectPorts(ctx, tx, vms, bySeq)
}

func notFound(id string) error { return fmt.Errorf("%w: %q", smolvm.ErrVMNotFound, id) }
