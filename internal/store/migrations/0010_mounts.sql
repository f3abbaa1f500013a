-- Directories of the host that a VM has are in its options. Nothing else changes; but a program
-- from before there were any would start the VM without them, so it is not to open the database.
SELECT 1;
