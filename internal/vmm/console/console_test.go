package console

import "testing"

func TestPanicLine(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"": "",
		"[1.0] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n[1.0] CPU: 0": "VFS: Unable to mount root fs on unknown-block(0,0)",
		"a user prints Kernel panic\n": "",
	} {
		if got := PanicLine(text); got != want {
			t.Errorf("PanicLine(%q) = %q, want %q", text, got, want)
		}
	}
}
