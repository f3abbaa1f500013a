package cli

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/termsafe"
)

// buildProgress shows how the build of a Dockerfile goes on, as docker does: plain, with all that
// commands say, or on a terminal with one line for each step, of which the last one changes.
type buildProgress struct {
	w     io.Writer
	width int // 0: plain

	mu sync.Mutex // guards the following
	// current is the step that is under way, since when, and the beginning of a line of its
	// command.
	current smolvm.BuildEvent
	began   time.Time
	partial []byte
	// last are the last lines that it said, for a step that fails.
	last    []string
	drawn   time.Time
	visible bool // the line on the terminal is ours
}

const (
	// keptLines is how many lines of a step are shown when it fails.
	keptLines = 20
	// maxOutputLine is how long a line may be that is shown, in bytes.
	maxOutputLine = 4096
)

func newBuildProgress(o *output, plain bool) *buildProgress {
	p := &buildProgress{w: o.raw, width: terminalWidth(o)}
	if plain {
		p.width = 0
	}
	return p
}

// update shows an event.
func (p *buildProgress) update(event smolvm.BuildEvent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	event.Name, event.Warning = termsafe.Line(event.Name), termsafe.Line(event.Warning)
	switch {
	case event.Warning != "":
		p.clear()
		p.printf("WARNING: %s\n", event.Warning)
	case event.Done:
		p.done(event)
	case event.Output != nil:
		p.output(event.Output)
	default:
		p.current, p.began, p.partial, p.last = event, time.Now(), nil, nil
		if p.width == 0 {
			p.printf("#%d %s\n", event.Step, event.Name)
		}
		p.draw("")
	}
}

func (p *buildProgress) printf(format string, args ...any) { _, _ = fmt.Fprintf(p.w, format, args...) }

// output shows what a command says, line by line.
func (p *buildProgress) output(text []byte) {
	p.partial = append(p.partial, text...)
	for {
		line, rest, whole := bytes.Cut(p.partial, []byte("\n"))
		if !whole && len(line) <= maxOutputLine {
			return
		}
		if len(line) > maxOutputLine {
			line, rest = p.partial[:maxOutputLine], p.partial[maxOutputLine:]
		}
		p.line(string(line))
		p.partial = rest
	}
}

func (p *buildProgress) line(text string) {
	text = termsafe.Text(string(bytes.TrimRight([]byte(text), "\r")))
	if p.last = append(p.last, text); len(p.last) > keptLines {
		p.last = p.last[1:]
	}
	if p.width == 0 {
		p.printf("#%d %.3f %s\n", p.current.Step, time.Since(p.began).Seconds(), text)
		return
	}
	p.draw(text)
}

// done shows the end of a step.
func (p *buildProgress) done(event smolvm.BuildEvent) {
	if len(p.partial) > 0 {
		p.line(string(p.partial))
		p.partial = nil
	}
	seconds := event.Duration.Seconds()
	p.clear()
	switch {
	case p.width == 0 && event.Err != nil:
		p.printf("#%d ERROR: %s\n", event.Step, termsafe.Line(event.Err.Error()))
	case p.width == 0 && event.Cached:
		p.printf("#%d CACHED\n\n", event.Step)
	case p.width == 0:
		p.printf("#%d DONE %.1fs\n\n", event.Step, seconds)
	case event.Err != nil:
		p.printf(" => ERROR %s\n", event.Name)
		for _, line := range p.last {
			p.printf("    %s\n", line)
		}
	case event.Cached:
		p.printf(" => CACHED %s\n", event.Name)
	default:
		p.printf(" => %s %.1fs\n", event.Name, seconds)
	}
}

// draw draws the step that is under way, with what it said last.
func (p *buildProgress) draw(said string) {
	if p.width == 0 || p.visible && time.Since(p.drawn) < redrawEvery {
		return
	}
	p.drawn, p.visible = time.Now(), true
	text := fmt.Sprintf(" => %s %.0fs %s", p.current.Name, time.Since(p.began).Seconds(), termsafe.Line(said))
	p.printf("\r\x1b[K%s", truncate(text, max(p.width-1, 1)))
}

// clear takes our line off the terminal.
func (p *buildProgress) clear() {
	if p.visible {
		p.printf("\r\x1b[K")
	}
	p.visible = false
}

// finish takes what changes off the terminal.
func (p *buildProgress) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}
