-- How a VM is connected is in its options; without it, by the user network. Pool is the network
-- of IPv4 that its address is in, as text; NULL: it has none in a pool.
ALTER TABLE vms ADD COLUMN pool TEXT;
