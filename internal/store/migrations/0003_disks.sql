-- Names of files in the data directory are relative to it, so that it can be moved, and so
-- that a copy of it is a directory of its own. Until now they were absolute.
CREATE TABLE former (root TEXT NOT NULL) STRICT; -- where the data directory was then

INSERT INTO former (root)
    SELECT substr(log_path, 1, length(log_path) - length('/vms/' || id || '/console.log'))
    FROM vms WHERE substr(log_path, -length('/vms/' || id || '/console.log')) = '/vms/' || id || '/console.log'
    ORDER BY seq DESC LIMIT 1;

UPDATE vms SET log_path = 'vms/' || id || '/console.log'
    WHERE substr(log_path, -length('/vms/' || id || '/console.log')) = '/vms/' || id || '/console.log';

-- A disk that is the user's own root file system keeps its path.
UPDATE vms SET disk_path = 'disks/' || id || '.qcow2'
    WHERE substr(disk_path, -length('/disks/' || id || '.qcow2')) = '/disks/' || id || '.qcow2'
    AND disk_path IS NOT json_extract(options, '$.rootfs_path');

-- What each disk file is or may be based on: nothing that is a base here is removed while
-- the file with it is there, or is a VM's disk.
CREATE TABLE bases (
    path TEXT NOT NULL,
    base TEXT NOT NULL,
    PRIMARY KEY (path, base)
) STRICT, WITHOUT ROWID;

CREATE INDEX bases_by_base ON bases (base);

INSERT INTO bases (path, base)
    SELECT disk_path, 'images/' || substr(image, 1 + length('sha256:')) || '/rootfs' FROM vms
    WHERE image IS NOT NULL AND disk_path = 'disks/' || id || '.qcow2';
