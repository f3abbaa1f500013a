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

func TestFarewellOf(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]Farewell{
		"[   12.345678] reboot: System halted\r":               Halted,
		"[   12.345678] reboot: Power down\r\n":                Halted,
		"reboot: System halted":                                Halted,
		"[    1.0] reboot: Restarting system":                  Restart,
		"[    1.0] reboot: Restarting system with command 'x'": Restart,
		"":  None,
		"[": None,
		"[ OK ] reached target: reboot: System halted":          None,
		"a user says reboot: System halted":                     None,
		"[    1.0] systemd-shutdown[1]: reboot: System halted.": None,
	} {
		if got := FarewellOf(line); got != want {
			t.Errorf("FarewellOf(%q) = %v, want %v", line, got, want)
		}
	}
}
