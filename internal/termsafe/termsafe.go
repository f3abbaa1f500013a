// Package termsafe makes text that a guest may have written harmless, before a terminal
// sees it. A terminal obeys what is printed on it: it can be made to clear its screen,
// change its title, write to the clipboard, hide what follows, or answer as if the user
// had typed.
//
// What passes is printable text, tabs and line breaks, and from a [Writer] colours too.
// Control sequences are left out as a whole. Every other control character, formatting
// character (such as those that turn the direction of writing), and byte that is not UTF-8
// becomes U+FFFD, so that it can be seen that something was there.
package termsafe

import (
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Text returns s without anything that a terminal would obey, but for tabs and line
// breaks. Colours are left out too: it is for text that is quoted among ours.
func Text(s string) string {
	if isPlain(s) {
		return s
	}
	f := filter{}
	f.write([]byte(s))
	f.end()
	return string(f.out)
}

// Line is [Text] in one line: whitespace, line breaks too, becomes a single space.
func Line(s string) string { return strings.Join(strings.Fields(Text(s)), " ") }

// isPlain reports whether s is of printable ASCII characters, tabs and line breaks.
func isPlain(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < ' ' && c != '\n' && c != '\t') || c >= 0x7f {
			return false
		}
	}
	return true
}

// Printable reports whether a terminal shows the character, and does nothing else.
func Printable(r rune) bool {
	// The joiner is part of many emoji, and of words in some scripts.
	const zeroWidthJoiner = '\u200d'
	return unicode.IsPrint(r) || r == zeroWidthJoiner
}

// Writer makes what is written to it harmless and passes it on. Colours and other
// attributes of characters (SGR) pass, but for the one that hides text. What a character
// or a control sequence lacks may come with the next write.
type Writer struct {
	w io.Writer
	f filter
}

// NewWriter returns a Writer that writes to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w, f: filter{colours: true}} }

// Write implements [io.Writer].
func (w *Writer) Write(p []byte) (int, error) {
	w.f.out = w.f.out[:0]
	w.f.write(p)
	if _, err := w.w.Write(w.f.out); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush ends what is unfinished, and sets the terminal's colours back if they were changed.
// The Writer can be written to after it.
func (w *Writer) Flush() error {
	w.f.out = w.f.out[:0]
	w.f.end()
	if len(w.f.out) == 0 {
		return nil
	}
	_, err := w.w.Write(w.f.out)
	return err
}

// state is where in a control sequence a filter is; see ECMA-48, and ctlseqs of xterm.
type state int

const (
	inText    state = iota
	atReturn        // after a carriage return
	inEscape        // after ESC
	inCharset       // after ESC and an intermediate byte
	inCSI           // after ESC [
	inString        // in an OSC, DCS, SOS, PM or APC string
)

const (
	escape = 0x1b
	bell   = 0x07
	cancel = 0x18
	// maxCSI is how long the parameters of a control sequence may be, and maxString a
	// string: what is longer is none.
	maxCSI    = 64
	maxString = 4 << 10
)

const unknown = string(utf8.RuneError)

// filter is a parser of what goes to a terminal.
type filter struct {
	colours bool

	state    state
	partial  []byte // of a character, or the parameters of a control sequence
	length   int    // of the string
	coloured bool   // what passed has changed the terminal's attributes
	out      []byte
}

func (f *filter) write(p []byte) {
	for _, c := range p {
		for f.step(c) { // again, in another state
		}
	}
}

// step takes a byte. It reports whether the byte is still to be taken, in the state in
// which the filter is now.
func (f *filter) step(c byte) (again bool) {
	switch f.state {
	case inText:
		return f.text(c)
	case atReturn:
		// Serial lines end in a return and a line feed, some in two returns. One in the
		// middle of a line would let what follows overwrite what is there.
		f.state = inText
		if c != '\n' && c != '\r' {
			f.out = append(f.out, '\n')
		}
		return true
	case inEscape:
		return f.escaped(c)
	case inCharset:
		if c >= ' ' && c <= '/' {
			return false
		}
		return f.leave(c >= '0' && c <= '~')
	case inCSI:
		return f.csi(c)
	default:
		return f.string(c)
	}
}

// leave goes back to text: whole after a sequence that is known, which ends with this byte.
// After any other the byte is text.
func (f *filter) leave(whole bool) (again bool) {
	f.state, f.partial = inText, f.partial[:0]
	if !whole {
		f.out = append(f.out, unknown...)
	}
	return !whole
}

func (f *filter) text(c byte) (again bool) {
	if len(f.partial) > 0 || c >= utf8.RuneSelf {
		return f.multibyte(c)
	}
	switch {
	case c >= ' ' && c <= '~', c == '\n', c == '\t':
		f.out = append(f.out, c)
	case c == '\r':
		f.state = atReturn
	case c == escape:
		f.state = inEscape
	default:
		f.out = append(f.out, unknown...)
	}
	return false
}

// multibyte takes a byte of a character that has more than one.
func (f *filter) multibyte(c byte) (again bool) {
	if len(f.partial) > 0 && utf8.RuneStart(c) {
		f.partial = f.partial[:0] // it was cut off
		f.out = append(f.out, unknown...)
		return true
	}
	f.partial = append(f.partial, c)
	if !utf8.FullRune(f.partial) {
		return false
	}
	r, size := utf8.DecodeRune(f.partial)
	bad := r == utf8.RuneError && size == 1
	count := len(f.partial)
	f.partial = f.partial[:0]
	switch {
	case bad:
		for range count {
			f.out = append(f.out, unknown...)
		}
	case unicode.Is(unicode.Zs, r):
		f.out = append(f.out, ' ')
	case Printable(r):
		f.out = utf8.AppendRune(f.out, r)
	default:
		f.out = append(f.out, unknown...)
	}
	return false
}

// escaped takes the byte after ESC.
func (f *filter) escaped(c byte) (again bool) {
	switch {
	case c == '[':
		f.state = inCSI
	case strings.IndexByte("]PX^_", c) >= 0:
		f.state, f.length = inString, 0
	case c >= ' ' && c <= '/':
		f.state = inCharset
	default:
		return f.leave(c >= '0' && c <= '~')
	}
	return false
}

func (f *filter) csi(c byte) (again bool) {
	switch {
	case c >= ' ' && c <= '?' && len(f.partial) < maxCSI:
		f.partial = append(f.partial, c)
		return false
	case c == 'm' && f.colours && isSGR(f.partial):
		f.out = append(f.out, escape, '[')
		f.out = append(append(f.out, f.partial...), c)
		f.coloured = len(strings.Trim(string(f.partial), "0;")) > 0
		return f.leave(true)
	}
	return f.leave(c >= '@' && c <= '~')
}

// isSGR reports whether parameters set colours or other attributes, and do not hide text.
func isSGR(parameters []byte) bool {
	const conceal = "8"
	for _, c := range parameters {
		if (c < '0' || c > '9') && c != ';' && c != ':' {
			return false
		}
	}
	words := strings.Split(string(parameters), ";")
	for i := 0; i < len(words); i++ {
		switch strings.TrimLeft(words[i], "0") {
		case conceal:
			return false
		case "38", "48", "58": // a colour follows: 5;N or 2;R;G;B
			if i+1 < len(words) && words[i+1] == "5" {
				i += 2
			} else if i+1 < len(words) && words[i+1] == "2" {
				i += 4
			}
		}
	}
	return true
}

// string takes a byte of a string that is left out. One that does not end must not hide
// all that follows.
func (f *filter) string(c byte) (again bool) {
	f.length++
	switch {
	case c == bell, c == cancel:
		return f.leave(true)
	case c == escape:
		f.state = inEscape // most likely of ESC \, which ends the string
		return false
	case c == '\n', f.length > maxString:
		return f.leave(false)
	}
	return false
}

// end ends what is unfinished.
func (f *filter) end() {
	switch {
	case f.state == atReturn:
		f.out = append(f.out, '\n')
	case f.state != inText, len(f.partial) > 0:
		f.out = append(f.out, unknown...)
	}
	f.state, f.partial = inText, f.partial[:0]
	if f.coloured {
		f.out = append(f.out, "\x1b[0m"...)
	}
	f.coloured = false
}
