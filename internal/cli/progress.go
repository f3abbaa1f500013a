package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/termsafe"
)

// progress shows how a long operation goes on: on a terminal in a line that changes, or one for
// each item of a phase, elsewhere as one line for each phase. A nil progress shows nothing.
type progress struct {
	w     io.Writer
	width int // 0: not a terminal

	mu      sync.Mutex // guards the following
	phase   string
	drawn   time.Time
	visible bool // the line on the terminal is ours
	// items are those of the phase, in the order in which they came, each with a line of its
	// own; the cursor is on the last.
	items []smolvm.Progress
}

// maxItems is how many items have a line; those that come when there are so many share the last.
const maxItems = 16

// redrawEvery keeps a fast operation from drawing more than anybody can see.
const redrawEvery = 100 * time.Millisecond

// newProgress returns a progress that draws on the stream itself: it moves the cursor.
func newProgress(o *output) *progress { return &progress{w: o.raw, width: terminalWidth(o)} }

// quietFlag adds the flag by which a command shows no progress.
func quietFlag(cmd *cobra.Command, quiet *bool) {
	cmd.Flags().BoolVarP(quiet, "quiet", "q", false, "don't show progress")
}

// showProgress has a command show its progress, unless it is quiet, and returns what a call reports it
// to; nil if nothing is shown.
func (a *app) showProgress(quiet bool) func(smolvm.Progress) {
	if quiet {
		return nil
	}
	a.progress = newProgress(a.Stderr)
	return a.progress.report()
}

func (p *progress) update(step smolvm.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	step.Phase = termsafe.Line(step.Phase)
	step.Item = termsafe.Line(step.Item)
	fresh := step.Phase != p.phase
	p.phase = step.Phase
	if p.width == 0 {
		if fresh {
			_, _ = fmt.Fprintf(p.w, "smolvm: %s\n", step.Phase)
		}
		return
	}
	if fresh {
		p.clear()
	}
	if step.Item != "" {
		p.updateItem(step)
		return
	}
	if !fresh && time.Since(p.drawn) < redrawEvery && step.Done != step.Total {
		return
	}
	p.drawn = time.Now()
	p.visible = true
	// Back to the start of the line, and clear it.
	_, _ = fmt.Fprintf(p.w, "\r\x1b[K%s", progressLine(step, p.width-1))
}

// updateItem draws the lines of a phase's items.
func (p *progress) updateItem(step smolvm.Progress) {
	before := len(p.items)
	i := slices.IndexFunc(p.items, func(s smolvm.Progress) bool { return s.Item == step.Item })
	switch {
	case i >= 0:
		p.items[i] = step
	case before == maxItems:
		p.items[before-1] = step
	default:
		p.items = append(p.items, step)
	}
	if len(p.items) == before && time.Since(p.drawn) < redrawEvery && step.Done != step.Total {
		return
	}
	p.drawn, p.visible = time.Now(), true
	text := up(before - 1)
	for i, item := range p.items {
		if i > 0 {
			text += "\n"
		}
		item.Phase += ", " + item.Item
		text += "\r\x1b[K" + progressLine(item, p.width-1)
	}
	_, _ = io.WriteString(p.w, text)
}

// up moves the cursor up some lines.
func up(lines int) string {
	if lines <= 0 {
		return ""
	}
	return fmt.Sprintf("\x1b[%dA", lines)
}

// clear takes our lines off the terminal.
func (p *progress) clear() {
	if p.visible {
		// From the first of them to the end of the screen.
		_, _ = io.WriteString(p.w, up(len(p.items)-1)+"\r\x1b[J")
	}
	p.visible, p.items = false, nil
}

// report returns what a call reports its progress to; nil for a progress that shows nothing.
func (p *progress) report() func(smolvm.Progress) {
	if p == nil {
		return nil
	}
	return p.update
}

// finish takes what is drawn off the terminal.
func (p *progress) finish() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	p.phase = ""
}

// progressLine draws a step in at most width characters.
func progressLine(step smolvm.Progress, width int) string {
	line := step.Phase + " ..."
	switch {
	case step.Total > 0:
		amount := byteSize(step.Done) + " of " + byteSize(step.Total)
		const bar = 24
		line = fmt.Sprintf("%-20s %s %s", step.Phase, progressBar(step, bar), amount)
		if utf8.RuneCountInString(line) > width {
			line = truncate(step.Phase, max(width-len(amount)-1, 1)) + " " + amount
		}
	case step.Done > 0:
		line = step.Phase + " " + byteSize(step.Done)
	}
	return truncate(line, max(width, 1))
}

func progressBar(step smolvm.Progress, length int) string {
	full := int(min(step.Done, step.Total) * int64(length) / step.Total)
	return "[" + strings.Repeat("#", full) + strings.Repeat("-", length-full) + "]"
}
