package session

import (
	"context"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/vmm"
)

// Usage returns what the VM has taken of the host.
func (s *Session) Usage(ctx context.Context) (usage smolvm.Usage, err error) {
	pid := s.instance.PID()
	if usage.CPUTime, err = proc.CPUTime(pid); err != nil {
		return usage, err
	}
	if usage.Memory, err = proc.Resident(pid); err != nil {
		return usage, err
	}
	if meter, ok := s.instance.(vmm.Meter); ok {
		disk, err := meter.DiskUsage(ctx)
		if err != nil {
			return usage, err
		}
		usage.Disk = &disk
	}
	if meter, ok := s.network.(network.Meter); ok {
		passed, err := meter.Usage()
		if err != nil {
			return usage, err
		}
		usage.Network = &passed
	}
	return usage, nil
}
