package vmm

import "testing"

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
