package main

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/term"
)

// status shows on a terminal what is being done, in place of what it showed before.
func status(format string, args ...any) {
	if term.IsTerminal(int(os.Stderr.Fd())) {
		_, _ = fmt.Fprintf(os.Stderr, "\r\033[K"+format, args...)
	}
}

// ms is a time in milliseconds, with three digits at least.
func ms(d time.Duration) string {
	value := float64(d) / float64(time.Millisecond)
	if value >= 100 {
		return strconv.FormatFloat(value, 'f', 0, 64) + " ms"
	}
	return strconv.FormatFloat(value, 'g', 3, 64) + " ms"
}
