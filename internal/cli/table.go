package cli

import (
	"io"
	"strings"
	"unicode/utf8"

	"github.com/smolvm/smolvm/internal/termsafe"
)

// Colours of cells, as parameters of the terminal's SGR sequence.
const (
	plain  = ""
	red    = "31"
	green  = "32"
	yellow = "33"
)

// cell is one field of a table.
type cell struct {
	text  string
	color string
}

// table is text in columns.
type table struct {
	titles []string
	rows   [][]cell
	// shrinks lists the columns that may lose text when a terminal is too narrow,
	// the first one first.
	shrinks []int
}

const (
	columnGap = 2
	// minShrunk is as narrow as a column may get.
	minShrunk = 6
)

func (t *table) add(texts ...string) {
	row := make([]cell, len(texts))
	for i, text := range texts {
		row[i].text = text
	}
	t.addCells(row...)
}

func (t *table) addCells(row ...cell) {
	for i := range row {
		row[i].text = termsafe.Line(row[i].text)
		if row[i].text == "" {
			row[i].text = "-"
		}
	}
	t.rows = append(t.rows, row)
}

// write prints the table so that it fits into width characters; 0: any width.
func (t *table) write(w io.Writer, width int, color bool) error {
	titles := make([]cell, len(t.titles))
	for i, title := range t.titles {
		titles[i].text = title
	}
	rows := append([][]cell{titles}, t.rows...)
	widths := t.fit(rows, width)
	var b strings.Builder
	for _, row := range rows {
		for i, c := range row {
			text := truncate(c.text, widths[i])
			pad := widths[i] - utf8.RuneCountInString(text) + columnGap
			if color {
				text = paint(text, c.color)
			}
			b.WriteString(text)
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", pad))
			}
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// fit computes the widths of the columns.
func (t *table) fit(rows [][]cell, width int) []int {
	widths := make([]int, len(t.titles))
	for _, row := range rows {
		for i, c := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	if width == 0 {
		return widths
	}
	excess := columnGap*(len(widths)-1) - width
	for _, w := range widths {
		excess += w
	}
	for _, i := range t.shrinks {
		if excess <= 0 {
			break
		}
		least := max(minShrunk, utf8.RuneCountInString(t.titles[i]))
		cut := min(excess, max(widths[i]-least, 0))
		widths[i] -= cut
		excess -= cut
	}
	return widths
}

// truncate shortens text to width characters, the last of which then tells of it.
func truncate(text string, width int) string {
	if utf8.RuneCountInString(text) <= width {
		return text
	}
	return string([]rune(text)[:width-1]) + "…"
}

func paint(text, color string) string {
	if color == plain {
		return text
	}
	return "\x1b[" + color + "m" + text + "\x1b[0m"
}

// print prints the table on standard output.
func (a *app) print(t *table) error {
	return t.write(a.Stdout, terminalWidth(a.Stdout), colored(a.Stdout))
}
