package termsafe_test

import (
	"bytes"
	"io"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/smolvm/smolvm/internal/termsafe"
)

// colour is what may be left of control sequences.
var colour = regexp.MustCompile(`\x1b\[[0-9;:]*m`)

// checkHarmless reports what a terminal would obey.
func checkHarmless(t *testing.T, text string) {
	t.Helper()
	if !utf8.ValidString(text) {
		t.Errorf("%q is not UTF-8", text)
	}
	for _, r := range text {
		if r != '\n' && r != '\t' && !termsafe.Printable(r) {
			t.Errorf("%q is left in %q", r, text)
		}
	}
}

func TestFilter(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ in, text, writer string }{
		"text":              {in: "a\tb\nc", text: "a\tb\nc"},
		"other scripts":     {in: "äß €10 日本 👩\u200d💻", text: "äß €10 日本 👩\u200d💻"},
		"lines of a serial": {in: "a\r\nb\r\r\nc", text: "a\nb\nc"},
		"return":            {in: "good\rbad", text: "good\nbad"},
		"last return":       {in: "a\r", text: "a\n"},
		"colours":           {in: "\x1b[1;31mred\x1b[0m", text: "red", writer: "\x1b[1;31mred\x1b[0m"},
		"colour is set back": {
			in: "\x1b[38;5;8mred", text: "red", writer: "\x1b[38;5;8mred\x1b[0m",
		},
		"direct colour":    {in: "\x1b[48;2;8;8;8mred\x1b[m", text: "red", writer: "\x1b[48;2;8;8;8mred\x1b[m"},
		"hidden":           {in: "a\x1b[8mb", text: "ab"},
		"hidden, disguise": {in: "a\x1b[1;008mb\x1b[38;5;1;8mc", text: "abc"},
		"clear":            {in: "a\x1b[2J\x1b[Hb", text: "ab"},
		"private":          {in: "a\x1b[?1049hb\x1b[>4;2mc\x1b[?25lb", text: "abcb"},
		"title by BEL":     {in: "a\x1b]0;owned\x07b", text: "ab"},
		"title by ST":      {in: "a\x1b]0;owned\x1b\\b", text: "ab"},
		"clipboard":        {in: "\x1b]52;c;ZXZpbA==\x07", text: ""},
		"device string":    {in: "a\x1bP$q\"p\x1b\\b", text: "ab"},
		"other strings":    {in: "a\x1b_x\x1b\\b\x1b^y\x1b\\c\x1bXz\x1b\\d", text: "abcd"},
		"open string":      {in: "a\x1b]0;never ends\nb", text: "a\uFFFD\nb"},
		"long string":      {in: "\x1b]0;" + strings.Repeat("x", 10_000), text: "\uFFFD" + strings.Repeat("x", 10_000-4094)},
		"cancelled string": {in: "a\x1b]0;t\x18b", text: "ab"},
		"string in string": {in: "\x1b]0;\x1b]0;t\x07b", text: "b"},
		"reset":            {in: "a\x1bcb", text: "ab"},
		"charset":          {in: "a\x1b(0b\x1b#8c", text: "abc"},
		"cut sequences":    {in: "a\x1b", text: "a\uFFFD"},
		"cut CSI":          {in: "a\x1b[31", text: "a\uFFFD"},
		"CSI and line":     {in: "a\x1b[3\n1m", text: "a\uFFFD\n1m"},
		"CSI in CSI":       {in: "\x1b[3\x1b[2Ja", text: "\uFFFDa"},
		"long CSI":         {in: "\x1b[" + strings.Repeat("1", 65) + "m", text: "\uFFFD1m"},
		"CSI, not ASCII":   {in: "\x1b[3äm", text: "\uFFFDäm"},
		"ESC, not ASCII":   {in: "\x1bä", text: "\uFFFDä"},
		"controls":         {in: "a\x00\x07\x08\x0b\x0c\x0e\x7fb", text: "a" + strings.Repeat("\uFFFD", 7) + "b"},
		"C1 as UTF-8":      {in: "a\u009b2J\u009d0;t\u009c", text: "a\uFFFD2J\uFFFD0;t\uFFFD"},
		"C1 as bytes":      {in: "a\x9b2J\x85", text: "a\uFFFD2J\uFFFD"},
		"bidi":             {in: "a\u202egnp.exe\u2066\u200f", text: "a\uFFFDgnp.exe\uFFFD\uFFFD"},
		"invisible":        {in: "a\u200b\ufeff\u2028\u2029\u00adb", text: "a" + strings.Repeat("\uFFFD", 5) + "b"},
		"spaces":           {in: "a\u00a0b\u3000c", text: "a b c"},
		"not UTF-8":        {in: "a\xffb\xc3(\xe2\x82", text: "a\uFFFDb\uFFFD(\uFFFD"},
		"overlong":         {in: "\xc0\x9b\xe0\x82\x9b", text: strings.Repeat("\uFFFD", 5)},
		"surrogate":        {in: "\xed\xa0\x80", text: "\uFFFD\uFFFD\uFFFD"},
		"tag characters":   {in: "a\U000E0041", text: "a\uFFFD"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := termsafe.Text(test.in); got != test.text {
				t.Errorf("Text(%q) = %q, want %q", test.in, got, test.text)
			}
			checkHarmless(t, termsafe.Text(test.in))
			want := test.writer
			if want == "" {
				want = test.text
			}
			// In one piece, and byte by byte.
			for _, size := range []int{len(test.in) + 1, 1} {
				if got := written(t, test.in, size); got != want {
					t.Errorf("a Writer makes %q of %q in pieces of %d, want %q", got, test.in, size, want)
				}
			}
		})
	}
}

func written(t *testing.T, text string, size int) string {
	t.Helper()
	var out bytes.Buffer
	w := termsafe.NewWriter(&out)
	for len(text) > 0 {
		n := min(size, len(text))
		if got, err := io.WriteString(w, text[:n]); got != n || err != nil {
			t.Fatalf("Write = %d, %v", got, err)
		}
		text = text[n:]
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestLine(t *testing.T) {
	t.Parallel()
	if got, want := termsafe.Line(" a\n\n\x1b[2Jb\u00a0\tc\r\n"), "a b c"; got != want {
		t.Errorf("Line is %q, want %q", got, want)
	}
}

// Whatever a guest writes, in whatever pieces, a terminal obeys no more than colours.
func FuzzWriter(f *testing.F) {
	for _, seed := range []string{"a\x1b[31mb\r\n", "\x1b]0;t\x07", "\x1b[\x1b]\x9b\xc2\x9b", "\xe2\x80\xae\r", "\x1bP\x1b\\"} {
		f.Add([]byte(seed), 3)
	}
	f.Fuzz(func(t *testing.T, text []byte, size int) {
		whole := written(t, string(text), len(text)+1)
		if got := written(t, string(text), max(1, size)); got != whole {
			t.Errorf("in pieces it is %q, as a whole %q", got, whole)
		}
		checkHarmless(t, colour.ReplaceAllString(whole, ""))
		checkHarmless(t, termsafe.Text(string(text)))
		if again := termsafe.Text(termsafe.Text(string(text))); again != termsafe.Text(string(text)) {
			t.Errorf("filtered again it is %q", again)
		}
	})
}
