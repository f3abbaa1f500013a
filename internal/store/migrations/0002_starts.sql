-- How each VM was last started, and who its guest has become: no two VMs may have any
-- part of an identity in common.
CREATE TABLE starts (
    vm         INTEGER PRIMARY KEY REFERENCES vms (seq) ON DELETE CASCADE,
    report     TEXT NOT NULL, -- JSON of the domain's StartReport
    boot_uuid  TEXT UNIQUE,   -- the guest's boot id
    random     TEXT UNIQUE,   -- drawn from the guest's kernel
    machine_id TEXT UNIQUE,
    host_key   TEXT UNIQUE,   -- the fingerprint of the guest's SSH host key
    mac        TEXT UNIQUE
) STRICT;

-- VMs to be kept ready. The VMs themselves are found where they are kept.
CREATE TABLE pools (
    id     TEXT PRIMARY KEY,
    size   INTEGER NOT NULL,
    config TEXT NOT NULL -- JSON of the domain's VMConfig
) STRICT;
