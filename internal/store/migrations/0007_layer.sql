-- The disk of a snapshot that a VM's own is made over; NULL: the root file system of its
-- image or configuration.
ALTER TABLE vms ADD COLUMN layer TEXT;

-- VMs whose restoring was cut short before they ran, and that nothing else says it of. One
-- that had an attempt at a template as well has the image written down, too.
UPDATE vms SET layer = (SELECT max(base) FROM bases WHERE path = disk_path)
    WHERE state = 'created'
    AND (SELECT count(*) FROM bases WHERE path = disk_path) = 1
    AND (SELECT max(base) FROM bases WHERE path = disk_path) LIKE 'layers/%';
