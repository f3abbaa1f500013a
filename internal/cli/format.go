package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf16"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/size"
	"github.com/smolvm/smolvm/internal/termsafe"
)

// printJSON prints one JSON value on standard output.
func (a *app) printJSON(value any) error { return a.encodeJSON(value, "  ") }

// printJSONLine prints one JSON value on a line of its own.
func (a *app) printJSONLine(value any) error { return a.encodeJSON(value, "") }

func (a *app) encodeJSON(value any, indent string) error {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetIndent("", indent)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		return err
	}
	_, err := io.WriteString(a.Stdout, escapeJSON(text.String()))
	return err
}

// escapeJSON escapes the characters in JSON's strings that a terminal would obey, which
// changes nothing for whoever decodes it. The encoder escapes ASCII's own.
func escapeJSON(text string) string {
	if strings.IndexFunc(text, isUnprintable) < 0 {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		if !isUnprintable(r) {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	return b.String()
}

func isUnprintable(r rune) bool { return r != '\n' && !termsafe.Printable(r) }

// printList prints a list as one JSON array.
func printList[T any](a *app, list []T) error {
	if list == nil {
		list = []T{}
	}
	return a.printJSON(list)
}

func (a *app) println(text string) error {
	_, err := fmt.Fprintln(a.Stdout, termsafe.Text(text))
	return err
}

// age says how long ago something was, in one unit.
func age(since, now time.Time) string {
	if since.IsZero() {
		return ""
	}
	d := now.Sub(since)
	switch {
	case d < time.Second:
		return "0s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// took formats a measured duration in the unit that suits it.
func took(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Minute:
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// byteSize formats a number of bytes in binary units.
func byteSize(n int64) string { return size.Format(n) }

func mebibytes(n int) string {
	if n >= 1<<10 && n%(1<<10) == 0 {
		return fmt.Sprintf("%dG", n>>10)
	}
	return fmt.Sprintf("%dM", n)
}

// shortDigest returns the beginning of a digest, long enough to name an image.
func shortDigest(digest string) string {
	const digits = 12
	digest = strings.TrimPrefix(digest, "sha256:")
	return digest[:min(digits, len(digest))]
}

func stateCell(state smolvm.VMState) cell {
	color := plain
	switch state {
	case smolvm.StateRunning:
		color = green
	case smolvm.StatePaused:
		color = yellow
	case smolvm.StateError:
		color = red
	case smolvm.StateCreated, smolvm.StateStopped:
	}
	return cell{string(state), color}
}
