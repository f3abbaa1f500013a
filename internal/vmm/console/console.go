// Package console knows what a Linux guest's kernel prints on its console when it ends.
package console

import "strings"

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
