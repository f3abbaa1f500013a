// Package console knows what a Linux guest's kernel prints on its console when it ends.
package console

import "strings"

// Farewell is the last that a kernel does.
type Farewell int

// The farewells.
const (
	None    Farewell = iota
	Halted           // it has stopped its CPUs, or asked the firmware to power off
	Restart          // it resets the machine
)

// FarewellOf returns which farewell a line of a console is; see kernel/reboot.c of Linux. The
// lines are of the highest level, so a kernel that is told to be quiet prints them too.
func FarewellOf(line string) Farewell {
	line = strings.TrimSpace(line)
	if strings.HasPrefix(line, "[") { // the time, unless the kernel was told to leave it out
		_, line, _ = strings.Cut(line, "] ")
	}
	switch {
	case line == "reboot: System halted", line == "reboot: Power down":
		return Halted
	case line == "reboot: Restarting system", strings.HasPrefix(line, "reboot: Restarting system with command "):
		return Restart
	}
	return None
}

// PanicText is how much of the end of a console the message of a panic is looked for in, in
// bytes.
const PanicText = 64 << 10

// PanicLine returns the kernel's message of its panic, from the text of a console; empty:
// there was none.
func PanicLine(text string) string {
	const mark = "Kernel panic - not syncing: "
	_, message, found := strings.Cut(text, mark)
	if !found {
		return ""
	}
	message, _, _ = strings.Cut(message, "\n")
	return strings.TrimSpace(message)
}
