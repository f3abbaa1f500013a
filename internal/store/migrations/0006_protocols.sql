-- A host port is a VM's for one protocol: TCP and UDP have ports of their own.
CREATE TABLE ports_by_protocol (
    seq        INTEGER PRIMARY KEY, -- the order in which they were added
    vm         INTEGER NOT NULL REFERENCES vms (seq) ON DELETE CASCADE,
    kind       TEXT    NOT NULL CHECK (kind IN ('ssh', 'forward')),
    protocol   TEXT    NOT NULL CHECK (protocol IN ('tcp', 'udp')),
    host_addr  TEXT    NOT NULL,
    host_port  INTEGER NOT NULL,
    guest_port INTEGER NOT NULL,
    UNIQUE (protocol, host_port)
) STRICT;

INSERT INTO ports_by_protocol (seq, vm, kind, protocol, host_addr, host_port, guest_port)
    SELECT seq, vm, kind, 'tcp', host_addr, host_port, guest_port FROM ports;

DROP TABLE ports;
ALTER TABLE ports_by_protocol RENAME TO ports;

CREATE INDEX ports_by_vm ON ports (vm);
