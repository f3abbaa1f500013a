package cli

import (
	"io"

	"github.com/smolvm/smolvm/internal/termsafe"
)

// output is a stream that a command prints to. What goes to a terminal by it is made
// harmless, as guests have written much of what is printed: their consoles, what they say
// of themselves, names and errors. What goes elsewhere passes as it is.
//
// The streams of a command in a guest are the user's own and are not an output: a program
// that one runs may draw on one's terminal.
type output struct {
	raw  io.Writer
	safe *termsafe.Writer // nil: not a terminal
}

func newOutput(w io.Writer) *output {
	_, isTerminal := terminal(w)
	return outputTo(w, isTerminal)
}

func outputTo(w io.Writer, isTerminal bool) *output {
	o := &output{raw: w}
	if isTerminal {
		o.safe = termsafe.NewWriter(w)
	}
	return o
}

// Write implements [io.Writer].
func (o *output) Write(p []byte) (int, error) {
	if o.safe != nil {
		return o.safe.Write(p)
	}
	return o.raw.Write(p)
}

// finish leaves a terminal in its usual colours.
func (o *output) finish() {
	if o.safe != nil {
		_ = o.safe.Flush() // all else was written
	}
}
