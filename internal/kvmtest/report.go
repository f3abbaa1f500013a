package kvmtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
)

// event is one line of what `go tool test2json` makes of a test binary's output.
type event struct {
	Action string
	Test   string
	Output string
}

// report makes each test of a stream of events, which ends with the test binary, a subtest of
// t: with its name, what it logs, and how it ends. It returns how many tests there were.
func report(t *testing.T, stream io.Reader, maySkip func(test string) bool) (tests int, err error) {
	r := reporter{maySkip: maySkip, subtests: map[string]*subtest{}}
	r.root = &subtest{started: make(chan *testing.T, 1), over: make(chan struct{})}
	r.root.started <- t
	defer r.end()
	events := json.NewDecoder(stream)
	for {
		var e event
		switch err := events.Decode(&e); {
		case errors.Is(err, io.EOF):
			return r.tests, nil
		case err != nil:
			return r.tests, fmt.Errorf("read events of tests: %w", err)
		}
		r.take(t, e)
	}
}

// reporter has the subtests of one job.
type reporter struct {
	maySkip  func(string) bool
	root     *subtest
	subtests map[string]*subtest // by the tests' whole names
	tests    int
}

// subtest is a subtest of the host's that reports one test.
type subtest struct {
	name string
	// started gets the subtest's T, and holds it. Over is closed when it has ended, or was
	// not run, as the host's -run does not match it.
	started chan *testing.T
	over    chan struct{}
	// events are those of the test; closed after its end.
	events   chan event
	children sync.WaitGroup
	ended    bool
}

// take takes one event.
func (r *reporter) take(t *testing.T, e event) {
	if e.Test == "" {
		// What the binary prints outside of its tests, as when it panics.
		if e.Action == "output" && !framing(e.Output) {
			_, _ = io.WriteString(t.Output(), e.Output)
		}
		return
	}
	if e.Action == "run" {
		r.tests++
		r.begin(e.Test)
		return
	}
	s := r.subtests[e.Test]
	if s == nil || s.ended {
		return
	}
	s.send(e)
	switch e.Action {
	case "pass", "fail", "skip":
		s.ended = true
		close(s.events)
	}
}

// send hands an event to the subtest, unless that is over.
func (s *subtest) send(e event) {
	select {
	case s.events <- e:
	case <-s.over:
	}
}

// begin starts the subtest of a test. The names of subtests may have slashes in them, so the
// parent is the test with the longest name that this one begins with.
func (r *reporter) begin(test string) {
	parent, name := r.root, test
	for at := len(test) - 1; at > 0; at-- {
		if found := r.subtests[test[:at]]; test[at] == '/' && found != nil {
			parent, name = found, test[at+1:]
			break
		}
	}
	s := &subtest{name: test, started: make(chan *testing.T, 1), over: make(chan struct{}), events: make(chan event)}
	r.subtests[test] = s
	parent.children.Go(func() {
		defer close(s.over)
		select {
		case t := <-parent.started:
			parent.started <- t
			t.Run(name, func(t *testing.T) { s.run(t, r.maySkip) })
		case <-parent.over:
		}
	})
}

// run is the subtest.
func (s *subtest) run(t *testing.T, maySkip func(string) bool) {
	s.started <- t
	last := ""
	var said strings.Builder // what tells why it was skipped
	for e := range s.events {
		switch {
		case e.Action != "output":
			last = e.Action
		case !framing(e.Output):
			said.WriteString(e.Output)
			_, _ = io.WriteString(t.Output(), e.Output)
		}
	}
	s.children.Wait()
	switch {
	case last == "pass":
	case last == "skip" && maySkip(s.name):
		t.SkipNow()
	case last == "skip":
		t.Errorf("it was skipped, and runs nowhere else: %s", strings.TrimSpace(said.String()))
	case last == "fail":
		t.Fail()
	default:
		t.Error("it did not end")
	}
}

// framing reports whether a line of output is one that tells of the beginning or the end of a
// test.
func framing(line string) bool {
	line = strings.TrimLeft(line, " ")
	for _, start := range []string{"=== RUN ", "=== PAUSE ", "=== CONT ", "=== NAME ", "--- PASS: ", "--- FAIL: ", "--- SKIP: "} {
		if strings.HasPrefix(line, start) {
			return true
		}
	}
	return line == "PASS\n" || line == "FAIL\n"
}

// end ends the subtests of tests that have not ended, and waits for all.
func (r *reporter) end() {
	for _, s := range r.subtests {
		if !s.ended {
			s.ended = true
			close(s.events)
		}
	}
	r.root.children.Wait()
}
