package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	sqlite3 "modernc.org/sqlite/lib"

	"github.com/smolvm/smolvm"
)

// guestSSHPort is where the forward of kind ssh leads to.
const guestSSHPort = 22

// Kinds of ports.
const (
	kindSSH     = "ssh"
	kindForward = "forward"
)

// Ports are the records of the VMs' host ports.
type Ports struct{ s *Store }

// Ports returns the records of the VMs' host ports.
func (s *Store) Ports() Ports { return Ports{s} }

// MoveSSH gives a VM the lowest free port for SSH in place of the one it has,
// which another program has taken, and returns the new one. Free is not asked again
// once it has accepted a port, so it may bind it. The error matches
// [smolvm.ErrVMNotFound] or [ErrNoneFree].
func (p Ports) MoveSSH(ctx context.Context, id string, free PortFree) (port int, err error) {
	err = p.s.update(ctx, func(tx *sql.Tx) error {
		port, err = p.s.move(ctx, tx, free, "kind = ?", kindSSH, id)
		if errors.Is(err, sql.ErrNoRows) {
			err = notFound(id)
		}
		return err
	})
	return port, err
}

// MoveForward is MoveSSH of a forward of the VM, if its host port was left open when it was added. The
// error matches [smolvm.ErrNotFound] if it was named, or there is no such forward.
func (p Ports) MoveForward(ctx context.Context, id string, forward smolvm.PortForward, free PortFree) (port int, err error) {
	err = p.s.update(ctx, func(tx *sql.Tx) error {
		port, err = p.s.move(ctx, tx, free, "chosen AND kind = ? AND protocol = ? AND host_port = ?",
			kindForward, text[smolvm.Protocol]{&forward.Protocol}, forward.HostPort, id)
		if errors.Is(err, sql.ErrNoRows) {
			err = fmt.Errorf("forward of host port %d/%s of VM %q, chosen by smolvm: %w", forward.HostPort, forward.Protocol, id, smolvm.ErrNotFound)
		}
		return err
	})
	return port, err
}

// move chooses another host port for the one row that a condition has, of a VM: the condition's
// arguments, and the VM's ID. The error is [sql.ErrNoRows] if there is none.
func (s *Store) move(ctx context.Context, tx *sql.Tx, free PortFree, condition string, args ...any) (int, error) {
	var seq int64
	var addr netip.Addr
	var protocol smolvm.Protocol
	err := tx.QueryRowContext(ctx, `SELECT ports.seq, protocol, host_addr FROM vms JOIN ports ON vm = vms.seq WHERE `+condition+` AND id = ?`,
		args...).Scan(&seq, text[smolvm.Protocol]{&protocol}, address{&addr})
	if err != nil {
		return 0, err
	}
	port, err := s.choosePort(ctx, tx, protocol, addr, free)
	if err != nil {
		return 0, err
	}
	_, err = tx.ExecContext(ctx, "UPDATE ports SET host_port = ? WHERE seq = ?", port, seq)
	return port, err
}

// AddForward adds a port forward to a VM, and returns it with the host port that was
// chosen if the forward leaves that open. The error matches [smolvm.ErrVMNotFound],
// [smolvm.ErrPortInUse] if a VM has the host port, or [ErrNoneFree].
func (p Ports) AddForward(ctx context.Context, id string, forward smolvm.PortForward, free PortFree) (smolvm.PortForward, error) {
	err := p.s.update(ctx, func(tx *sql.Tx) error {
		vm, err := seqOf(ctx, tx, id)
		if err != nil {
			return err
		}
		forward, err = p.s.insertForward(ctx, tx, vm, forward, free)
		return err
	})
	return forward, err
}

// RemoveForward removes the port forward of a host port from a VM. The error matches
// [smolvm.ErrNotFound] if the VM has none.
func (p Ports) RemoveForward(ctx context.Context, id string, protocol smolvm.Protocol, hostPort int) error {
	return p.s.update(ctx, func(tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx,
			"DELETE FROM ports WHERE protocol = ? AND host_port = ? AND kind = ? AND vm = (SELECT seq FROM vms WHERE id = ?)",
			text[smolvm.Protocol]{&protocol}, hostPort, kindForward, id)
		if err != nil {
			return err
		}
		n, err := result.RowsAffected()
		if err == nil && n == 0 {
			err = fmt.Errorf("forward of host port %d/%s to VM %q: %w", hostPort, protocol, id, smolvm.ErrNotFound)
		}
		return err
	})
}

// insertPorts gives a new VM its port for SSH and those of its forwards.
func (s *Store) insertPorts(ctx context.Context, tx *sql.Tx, vm int64, n NewVM) (int, []smolvm.PortForward, error) {
	forwards := slices.Clone(n.Config.PortForwards)
	// What is chosen here must not be what a later forward asks for.
	spare := func(protocol smolvm.Protocol, addr netip.Addr, port int) bool {
		asked := slices.ContainsFunc(forwards, func(f smolvm.PortForward) bool { return f.HostPort == port && f.Protocol == protocol })
		return !asked && (n.PortFree == nil || n.PortFree(protocol, addr, port))
	}
	sshPort, err := s.choosePort(ctx, tx, smolvm.TCP, n.Config.SSHHostAddr, spare)
	if err != nil {
		return 0, nil, err
	}
	err = insertPort(ctx, tx, vm, kindSSH,
		smolvm.PortForward{Protocol: smolvm.TCP, HostAddr: n.Config.SSHHostAddr, HostPort: sshPort, GuestPort: guestSSHPort}, true)
	for i := 0; i < len(forwards) && err == nil; i++ {
		forwards[i], err = s.insertForward(ctx, tx, vm, forwards[i], spare)
	}
	return sshPort, forwards, err
}

// insertForward reserves the host port of a forward, which is chosen here if that is left open, and
// returns the forward with it.
func (s *Store) insertForward(ctx context.Context, tx *sql.Tx, vm int64, f smolvm.PortForward, free PortFree) (smolvm.PortForward, error) {
	chosen := f.HostPort == 0
	if chosen {
		var err error
		if f.HostPort, err = s.choosePort(ctx, tx, f.Protocol, f.HostAddr, free); err != nil {
			return f, err
		}
	}
	return f, insertPort(ctx, tx, vm, kindForward, f, chosen)
}

// choosePort returns the lowest host port of a protocol that no VM has and that is free.
func (s *Store) choosePort(ctx context.Context, tx *sql.Tx, protocol smolvm.Protocol, addr netip.Addr, free PortFree) (int, error) {
	ports := s.opts.Ports
	condition := "protocol = 'tcp'"
	if protocol == smolvm.UDP {
		condition = "protocol = 'udp'"
	}
	for from := ports.First; ; {
		port, err := lowestFree(ctx, tx, "ports", "host_port", condition, from)
		if err != nil {
			return 0, err
		}
		if port > ports.Last {
			return 0, fmt.Errorf("%w: all host ports from %d to %d are taken, by VMs or by other programs",
				ErrNoneFree, ports.First, ports.Last)
		}
		if free == nil || free(protocol, addr, port) {
			return port, nil
		}
		from = port + 1
	}
}

// insertPort reserves the host port of a forward, which was chosen here or named.
func insertPort(ctx context.Context, tx *sql.Tx, vm int64, kind string, f smolvm.PortForward, chosen bool) error {
	_, err := tx.ExecContext(ctx,
		"INSERT INTO ports (vm, kind, protocol, host_addr, host_port, guest_port, chosen) VALUES (?, ?, ?, ?, ?, ?, ?)",
		vm, kind, text[smolvm.Protocol]{&f.Protocol}, address{&f.HostAddr}, f.HostPort, f.GuestPort, chosen)
	if resultCode(err) != sqlite3.SQLITE_CONSTRAINT_UNIQUE {
		return err
	}
	var owner string
	err = tx.QueryRowContext(ctx, "SELECT id FROM vms JOIN ports ON vm = vms.seq WHERE protocol = ? AND host_port = ?",
		text[smolvm.Protocol]{&f.Protocol}, f.HostPort).Scan(&owner)
	if err != nil {
		return err
	}
	return fmt.Errorf("port %d: %w by VM %q", f.HostPort, smolvm.ErrPortInUse, owner)
}

// selectPorts fills in the ports of VMs; bySeq says at which place the VM of a
// number is.
func selectPorts(ctx context.Context, tx *sql.Tx, vms []VM, bySeq map[int64]int) error {
	if len(vms) == 0 {
		return nil
	}
	seqs := slices.Collect(maps.Keys(bySeq))
	rows, err := tx.QueryContext(ctx, `SELECT vm, kind = 'ssh', protocol, host_addr, host_port, guest_port FROM ports
		WHERE vm BETWEEN ? AND ? ORDER BY seq`, slices.Min(seqs), slices.Max(seqs))
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	var seq int64
	var p port
	fields := append([]any{&seq}, p.fields()...)
	for rows.Next() {
		if err := rows.Scan(fields...); err != nil {
			return err
		}
		if i, ok := bySeq[seq]; ok { // else it is of a VM that was not asked for
			p.addTo(&vms[i])
		}
	}
	return rows.Err()
}

// port is a row of table ports.
type port struct {
	ssh     bool
	forward smolvm.PortForward
}

// fields returns the port's fields: whether its kind is ssh, protocol, host_addr, host_port and
// guest_port.
func (p *port) fields() []any {
	f := &p.forward
	return []any{&p.ssh, text[smolvm.Protocol]{&f.Protocol}, address{&f.HostAddr}, number[int]{&f.HostPort}, number[int]{&f.GuestPort}}
}

// addTo gives a VM the port, if there is one.
func (p *port) addTo(vm *VM) {
	switch {
	case p.forward.HostPort == 0:
	case p.ssh:
		vm.SSHPort, vm.Config.SSHHostAddr = p.forward.HostPort, p.forward.HostAddr
	default:
		vm.Forwards = append(vm.Forwards, p.forward)
	}
}

// seqOf returns the number of a VM's row.
func seqOf(ctx context.Context, tx *sql.Tx, id string) (int64, error) {
	var seq int64
	err := tx.QueryRowContext(ctx, "SELECT seq FROM vms WHERE id = ?", id).Scan(&seq)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, notFound(id)
	}
	return seq, err
}
