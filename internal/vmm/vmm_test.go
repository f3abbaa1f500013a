package vmm

import (
	"testing"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// What a halt says is known again from its words.
func TestShortCause(t *testing.T) {
	for want, halt := range map[string]Halt{"disk full": {NoSpace: true}, "I/O error": {Detail: "Input/output error"}} {
		for _, path := range []string{"", "/disks/web.qcow2"} {
			if got := ShortCause(halt.Cause(path)); got != want {
				t.Errorf("ShortCause(%q) = %q, want %q", halt.Cause(path), got, want)
			}
		}
	}
}

// The guest finds the channel by the names that backends give it.
func TestChannelNames(t *testing.T) {
	for host, guest := range map[string]string{ChannelPort: wire.PortName, ChannelVsockArg: wire.VsockArg} {
		if host != guest {
			t.Errorf("the host says %q, and the guest %q", host, guest)
		}
	}
}
