package qemu

import (
	"context"

	"github.com/smolvm/smolvm"
)

// DiskUsage implements [vmm.Meter].
func (i *instance) DiskUsage(ctx context.Context) (smolvm.DiskUsage, error) {
	var devices []struct {
		// Device is where the object model has the guest's device; empty for a node of which
		// no device knows.
		Device string `json:"qdev"`
		Stats  struct {
			Read    int64 `json:"rd_bytes"`
			Written int64 `json:"wr_bytes"`
			Reads   int64 `json:"rd_operations"`
			Writes  int64 `json:"wr_operations"`
		} `json:"stats"`
	}
	var sum smolvm.DiskUsage
	if err := i.qmp.execute(ctx, "query-blockstats", &devices); err != nil {
		return sum, err
	}
	for _, device := range devices {
		if device.Device == "" {
			continue
		}
		sum.Read += device.Stats.Read
		sum.Written += device.Stats.Written
		sum.Reads += device.Stats.Reads
		sum.Writes += device.Stats.Writes
	}
	return sum, nil
}
