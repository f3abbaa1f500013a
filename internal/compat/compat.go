// Package compat compares the numbers that formats and protocols carry which outlive an
// upgrade. A number grows only when a build that knows the one before would misunderstand
// what it reads; fields that may be ignored come without. What was written before there were
// numbers has 0, and is read.
package compat

import (
	"fmt"

	"github.com/smolvm/smolvm"
)

// Check returns an error if something has a number above the newest that this build knows.
// It matches [smolvm.ErrUnsupported].
func Check(what string, number, newest int) error {
	if number <= newest {
		return nil
	}
	return &smolvm.Error{
		Hint: "use the newer smolvm that made it, or upgrade this one",
		Err:  fmt.Errorf("%w: %s is of format %d, and this smolvm knows formats up to %d", smolvm.ErrUnsupported, what, number, newest),
	}
}
