-- Chosen is 1 for a host port that was left open, so that it may be another at the next start if a
-- program has taken it. Of forwards from before it is not known, so they stay.
ALTER TABLE ports ADD COLUMN chosen INTEGER NOT NULL DEFAULT 0 CHECK (chosen IN (0, 1));

UPDATE ports SET chosen = 1 WHERE kind = 'ssh';
