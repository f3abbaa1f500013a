-- A column of a VM that is empty or 0 is NULL: SQLite skips those fastest, and most
-- VMs have many. Times are nanoseconds since 1970 in UTC.

CREATE TABLE vms (
    seq         INTEGER PRIMARY KEY, -- the order of creation
    id          TEXT NOT NULL UNIQUE,
    state       TEXT NOT NULL,

    -- What was asked for. Options is all that has no column, as JSON without what is
    -- usual, so that to read thousands of usual VMs parses nothing.
    vcpus       INTEGER,
    memory_mib  INTEGER,
    image_name  TEXT,
    options     TEXT,

    -- What was decided when the VM was created.
    lease       INTEGER NOT NULL UNIQUE,
    image       TEXT,
    backend     TEXT,
    disk_path   TEXT,
    log_path    TEXT,
    machine_id  TEXT,
    host_key    TEXT,
    created_at  INTEGER,

    -- The current or last run.
    run         TEXT,
    pid         INTEGER,
    pid_start   INTEGER,
    shim_pid    INTEGER,
    shim_start  INTEGER,
    boot_id     TEXT,
    accelerator TEXT,
    cause       TEXT,
    started_at  INTEGER,
    stopped_at  INTEGER
) STRICT;

CREATE TABLE ports (
    seq        INTEGER PRIMARY KEY, -- the order in which they were added
    vm         INTEGER NOT NULL REFERENCES vms (seq) ON DELETE CASCADE,
    kind       TEXT    NOT NULL CHECK (kind IN ('ssh', 'forward')),
    host_addr  TEXT    NOT NULL,
    host_port  INTEGER NOT NULL UNIQUE,
    guest_port INTEGER NOT NULL
) STRICT;

CREATE INDEX ports_by_vm ON ports (vm);

-- No foreign key: events outlive their VM.
CREATE TABLE events (
    id          INTEGER PRIMARY KEY,
    vm_id       TEXT    NOT NULL,
    actor       TEXT    NOT NULL,
    action      TEXT    NOT NULL,
    at          INTEGER NOT NULL,
    duration_ns INTEGER NOT NULL,
    detail      TEXT    NOT NULL
) STRICT;

CREATE INDEX events_by_vm ON events (vm_id);
