package machine

import (
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/host"
	"github.com/smolvm/smolvm/internal/vmm"
)

// An emulated VM gets the time that it needs, whatever KVM is like on its host.
func TestBootTimeout(t *testing.T) {
	t.Parallel()
	b := &Builder{Host: host.New(host.Options{CacheDir: t.TempDir()})}
	if got := b.BootTimeout(t.Context(), vmm.TCG); got != 2*time.Minute {
		t.Errorf("emulated: %s", got)
	}
	best := b.Host.Accelerator(t.Context())
	if got := b.BootTimeout(t.Context(), best.Name); got < smolvm.DefaultBootTimeout || got != time.Duration(best.Slowness*float64(smolvm.DefaultBootTimeout)).Round(time.Second) {
		t.Errorf("by %+v: %s", best, got)
	}
}
