// Package store keeps what is known of all VMs in one SQLite database, which any
// number of processes may have open at the same time.
//
// # Schema
//
//	vms            seq (primary key)  the order of creation
//	               id (unique), state
//	               vcpus, memory_mib, image_name, options: what was asked for
//	               lease (unique): the index from which addresses follow, and
//	               pool: the network that they are in, if they are in one
//	               egress_revision, egress_within: of the egress policy in options
//	               image, disk_path, layer, host_key, ...: decided at creation
//	               run, pid, shim_pid, cause, ...: the current or last run
//	   ^
//	   | vm        deleting a VM deletes its ports
//	   |
//	ports          seq (primary key)  the order in which they were added
//	               host_port (unique), host_addr, guest_port
//	               kind: at most one 'ssh' per VM, any number of 'forward'
//
//	bases          path, base (primary key): what each disk file is based on
//
//	former         where the data directory was when paths were absolute
//
//	starts         vm (primary key)   one row per VM that was started
//	               report: how it was last started
//	               boot_uuid, random, machine_id, host_key, mac (each unique):
//	               what the guest said of itself then
//
//	pools          id (primary key), size, config: VMs to be kept ready
//
//	events         id (primary key)
//	               vm_id: no reference, as events outlive the VM
//	               actor, action, at, duration_ns, detail
//
// Leases and host ports are rows before anything is made on the host, and unique,
// so no two processes can give out the same one.
//
// # Rules
//
// Every exported method is one transaction; helpers take the transaction. A
// transaction that writes takes the database's write lock when it begins: it can
// then neither fail half-way because another process wrote, nor act on what it
// read before the other did. Nothing slow may happen inside one.
//
// The schema's version is in PRAGMA user_version: the number of migrations, in
// their order, that the database has been through. [Open] applies those that it
// lacks. A migration that has been released is never changed.
package store
