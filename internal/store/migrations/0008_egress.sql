-- The egress policy of a VM is in its options. Revision is that of the policy; NULL: it was
-- never given one. Within is the policy that none of this VM's may go beyond, as JSON; NULL:
-- the VM is no fork, nor restored from a snapshot.
ALTER TABLE vms ADD COLUMN egress_revision INTEGER;
ALTER TABLE vms ADD COLUMN egress_within TEXT;
