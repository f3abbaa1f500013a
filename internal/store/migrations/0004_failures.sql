-- When a VM that ran turned to error, until somebody has been told: see Store.TakeFailed.
ALTER TABLE vms ADD COLUMN failed_at INTEGER;
