package cli

import (
	"bytes"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm"
)

// buildEvents are those of a build whose second step fails, with hostile output.
func buildEvents() []smolvm.BuildEvent {
	one := smolvm.BuildEvent{Step: 1, Name: "[1/3] FROM base"}
	two := smolvm.BuildEvent{Step: 2, Name: "[2/3] RUN \x1b]0;title\x07x"}
	three := smolvm.BuildEvent{Step: 3, Name: "[3/3] COPY a b"}
	done := func(e smolvm.BuildEvent, cached bool, err error) smolvm.BuildEvent {
		e.Done, e.Cached, e.Err, e.Duration = true, cached, err, 1500*time.Millisecond
		return e
	}
	says := func(e smolvm.BuildEvent, text string) smolvm.BuildEvent {
		e.Output = []byte(text)
		return e
	}
	return []smolvm.BuildEvent{
		{Warning: "Dockerfile:2: careful"}, one, done(one, true, nil), three, done(three, false, nil),
		two, says(two, "first li"), says(two, "ne\nsecond\x1b[2J\r\nthi"), says(two, "rd"), done(two, false, errors.New("it has\nfailed")),
	}
}

func TestBuildProgressPlain(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	p := newBuildProgress(outputTo(&out, false), false)
	for _, event := range buildEvents() {
		p.update(event)
	}
	p.finish()
	got := regexp.MustCompile(`#2 \d+\.\d{3} `).ReplaceAllString(out.String(), "#2 TIME ")
	want := "WARNING: Dockerfile:2: careful\n#1 [1/3] FROM base\n#1 CACHED\n\n#3 [3/3] COPY a b\n#3 DONE 1.5s\n\n" +
		"#2 [2/3] RUN x\n#2 TIME first line\n#2 TIME second\n#2 TIME third\n#2 ERROR: it has failed\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// On a terminal each step has a line, and one that fails shows what it said last.
func TestBuildProgressTerminal(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	p := &buildProgress{w: &out, width: 30}
	for _, event := range buildEvents() {
		p.update(event)
	}
	for range keptLines {
		p.update(smolvm.BuildEvent{Step: 4, Output: []byte(strings.Repeat("x", 3*maxOutputLine))})
	}
	if len(p.partial) > maxOutputLine || len(p.last) > keptLines {
		t.Errorf("%d bytes and %d lines are kept", len(p.partial), len(p.last))
	}
	p.finish()
	text := out.String()
	for _, want := range []string{" => CACHED [1/3] FROM base\n", " => [3/3] COPY a b 1.5s\n", " => ERROR [2/3] RUN x\n    first line\n    second\n    third\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in %q", want, text)
		}
	}
	if strings.Contains(strings.ReplaceAll(text, "\r\x1b[K", ""), "\x1b") {
		t.Errorf("there are sequences of others in %q", text)
	}
	if !strings.HasSuffix(text, "\r\x1b[K") {
		t.Error("the line is left")
	}
}
