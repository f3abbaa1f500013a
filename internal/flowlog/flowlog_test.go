package flowlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/ring"
)

// read returns the records of a log, and what is wrong with it.
func read(t *testing.T, path string) ([]smolvm.FlowRecord, error) {
	t.Helper()
	var all []smolvm.FlowRecord
	err := Read(t.Context(), path, smolvm.FlowOptions{}, nil, func(r smolvm.FlowRecord) bool {
		all = append(all, r)
		return true
	})
	return all, err
}

func mustRead(t *testing.T, path string) []smolvm.FlowRecord {
	t.Helper()
	all, err := read(t, path)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// fill writes a run with so many connections to a log.
func fill(t *testing.T, path string, count int) {
	t.Helper()
	l := New(path, func(err error) { t.Error(err) })
	l.Record(smolvm.FlowRecord{Kind: smolvm.FlowStart, Run: "run"})
	for i := range count {
		l.Record(smolvm.FlowRecord{Kind: smolvm.FlowTCP, Event: smolvm.FlowOpen, Flow: l.NextFlow(), Address: fmt.Sprintf("192.0.2.1:%d", i)})
	}
	l.Record(smolvm.FlowRecord{Kind: smolvm.FlowStop})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// What is recorded is read as it was, by every run's own number, and one run goes on where the
// one before has ended.
func TestRecords(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "flows.jsonl")
	fill(t, path, 3)
	code := 3
	want := smolvm.FlowRecord{
		At: time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC), Kind: smolvm.FlowExec, Event: smolvm.FlowClose, Flow: 7,
		Args: []string{"sh", "-c", "exit 3"}, ExitCode: &code, Duration: 1500 * time.Microsecond, ReceivedBytes: 5, EgressRevision: 2,
	}
	l := New(path, nil)
	l.Record(want)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l.Record(want) // it is closed
	all := mustRead(t, path)
	if len(all) != 6 || all[0].Kind != smolvm.FlowStart || all[0].Prev != "" || all[4].Kind != smolvm.FlowStop {
		t.Fatalf("the log has %+v", all)
	}
	got := all[5]
	if got.Number != 6 || got.Prev != all[4].Hash || len(got.Hash) != hashChars {
		t.Errorf("the last record is %+v", got)
	}
	if record, err := open([]byte(got.Line)); err != nil || record.Number != 6 {
		t.Errorf("its line is %q", got.Line)
	}
	got.Number, got.Prev, got.Hash, got.Line = 0, "", "", ""
	if got.ExitCode == nil || *got.ExitCode != 3 {
		t.Errorf("the exit code is %v", got.ExitCode)
	}
	got.ExitCode, want.ExitCode = nil, nil
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("read %+v, want %+v", got, want)
	}
}

// Each way to change a log is found.
func TestTampering(t *testing.T) {
	t.Parallel()
	whole := filepath.Join(t.TempDir(), "flows.jsonl")
	fill(t, whole, 5)
	text, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(strings.TrimSuffix(string(text), "\n"), "\n")
	lines[len(lines)-1] += "\n"
	resealed := func(line string) string {
		r, err := open([]byte(strings.TrimSuffix(line, "\n")))
		if err != nil {
			t.Fatal(err)
		}
		r.Address = "198.51.100.1:1"
		sealed, _, err := seal(r)
		if err != nil {
			t.Fatal(err)
		}
		return string(sealed)
	}
	for name, change := range map[string]func(l []string) []string{
		"a byte":                  func(l []string) []string { l[2] = strings.Replace(l[2], "192.0.2.1", "192.0.2.2", 1); return l },
		"a hash":                  func(l []string) []string { l[2] = strings.Replace(l[2], `"hash":"`, `"hash":"0`, 1); return l },
		"a line with a new hash":  func(l []string) []string { l[2] = resealed(l[2]); return l },
		"a line is gone":          func(l []string) []string { return slices.Delete(l, 3, 4) },
		"a line is there twice":   func(l []string) []string { return slices.Insert(l, 3, l[2]) },
		"two lines are swapped":   func(l []string) []string { l[2], l[3] = l[3], l[2]; return l },
		"no JSON":                 func(l []string) []string { l[2] = "hello\n"; return l },
		"an empty line":           func(l []string) []string { return slices.Insert(l, 2, "\n") },
		"a long line":             func(l []string) []string { return slices.Insert(l, 2, strings.Repeat("x", 3*MaxLine)+"\n") },
		"the first line is gone":  func(l []string) []string { l[1] = strings.Replace(l[1], `"number":2`, `"number":1`, 1); return l[1:] },
		"the log begins anew":     func(l []string) []string { return append(l, l[0]) },
		"a field behind the hash": func(l []string) []string { l[2] = strings.Replace(l[2], `"}`, `","kind":"stop"}`, 1); return l },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "flows.jsonl")
			if err := os.WriteFile(path, []byte(strings.Join(change(slices.Clone(lines)), "")), 0o600); err != nil {
				t.Fatal(err)
			}
			all, err := read(t, path)
			if !errors.Is(err, smolvm.ErrFlowLogChanged) {
				t.Errorf("read %d records, %v", len(all), err)
			}
			// A writer goes on all the same, and what was changed stays to be found.
			fill(t, path, 1)
			if _, err := read(t, path); !errors.Is(err, smolvm.ErrFlowLogChanged) {
				t.Errorf("after another run: %v", err)
			}
			last := 0
			err = Read(t.Context(), path, smolvm.FlowOptions{Unverified: true}, nil, func(smolvm.FlowRecord) bool { last++; return true })
			if err != nil || last < 6 {
				t.Errorf("unverified it has %d records, %v", last, err)
			}
		})
	}
	// The beginning may be missing, as it may have been removed with an older file.
	path := filepath.Join(t.TempDir(), "flows.jsonl")
	if err := os.WriteFile(path, []byte(strings.Join(lines[3:], "")), 0o600); err != nil {
		t.Fatal(err)
	}
	if all := mustRead(t, path); len(all) != len(lines)-3 {
		t.Errorf("without its beginning it has %d records", len(all))
	}
}

// The log is bounded, and the chain goes on from one file to the next, and from one writer to the
// next.
func TestTurn(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "flows.jsonl")
	const limit, runs, each = 8 << 10, 20, 20
	for range runs {
		l := newLog(&writer{path: path, limit: limit}, func(err error) { t.Error(err) })
		for i := range each {
			l.Record(smolvm.FlowRecord{Kind: smolvm.FlowTCP, Event: smolvm.FlowOpen, Address: fmt.Sprintf("192.0.2.1:%d", i)})
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		mustRead(t, path)
	}
	all := mustRead(t, path)
	if first, last := all[0], all[len(all)-1]; first.Number < 2 || first.Prev == "" || last.Number != runs*each {
		t.Errorf("the log has records %d to %d", first.Number, last.Number)
	}
	for _, name := range []string{path, ring.Previous(path)} {
		info, err := os.Stat(name)
		if err != nil || info.Size() > limit || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	// A writer that was killed while it turned the log over has left no current file.
	if err := os.Rename(path, ring.Previous(path)); err != nil {
		t.Fatal(err)
	}
	before := mustRead(t, path)
	fill(t, path, 0)
	if after := mustRead(t, path); after[len(before)].Prev != before[len(before)-1].Hash {
		t.Errorf("after the turn: %+v", after[len(before)])
	}
}

// What a writer that was killed has left of a line is passed over by readers, and removed by the
// next writer, which records it.
func TestTornLine(t *testing.T) {
	t.Parallel()
	whole := filepath.Join(t.TempDir(), "flows.jsonl")
	fill(t, whole, 3)
	text, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	for cut := 1; cut < 400; cut += 37 {
		path := filepath.Join(t.TempDir(), "flows.jsonl")
		if err := os.WriteFile(path, text[:len(text)-cut], 0o600); err != nil {
			t.Fatal(err)
		}
		before := mustRead(t, path)
		fill(t, path, 1)
		after := mustRead(t, path)
		if lost := after[len(before)]; lost.Kind != smolvm.FlowLost || lost.Lost != 1 || !strings.Contains(lost.Detail, "not whole") {
			t.Errorf("cut by %d: after %d records comes %+v", cut, len(before), lost)
		}
	}
}

// flaky takes so many bytes, and then has no room.
type flaky struct {
	io.WriteCloser
	room int
}

func (f *flaky) Write(p []byte) (int, error) {
	n, err := f.WriteCloser.Write(p[:min(len(p), f.room)])
	if f.room -= n; n < len(p) && err == nil {
		err = &os.PathError{Op: "write", Path: "somewhere", Err: unix.ENOSPC}
	}
	return n, err
}

// A full disk loses records, which are counted, and leaves the log whole.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "flows.jsonl")
	w := &writer{path: path, limit: FileBytes}
	record := Clean(smolvm.FlowRecord{Kind: smolvm.FlowTCP, Detail: strings.Repeat("x", maxText)})
	batch := slices.Repeat([]smolvm.FlowRecord{record}, 10)
	if err := w.write(batch); err != nil {
		t.Fatal(err)
	}
	disk := &flaky{w.file, 700} // in the middle of a line
	w.file = disk
	written, failed := int64(10), 0
	for range 200 {
		if err := w.write(batch); err != nil {
			failed++
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
		}
	}
	if failed != 200 || w.lost == 0 || len(w.pending) > maxChunk+2*MaxLine {
		t.Errorf("%d writes failed, %d records were lost, %d bytes wait", failed, w.lost, len(w.pending))
	}
	written += 200*10 - w.lost
	mustRead(t, path)
	disk.room = 1 << 30
	if err := w.write(batch[:1]); err != nil {
		t.Fatal(err)
	}
	w.close()
	all := mustRead(t, path)
	lost := all[len(all)-2]
	if lost.Kind != smolvm.FlowLost || lost.Detail != unix.ENOSPC.Error() || int64(len(all)) != written+2 || lost.Lost != 2010-written {
		t.Errorf("of %d records before comes %+v, and %d are there", written, lost, len(all))
	}
}

// A log that can't be opened keeps nobody from anything, and is tried again.
func TestNoDirectory(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "later")
	problems := make(chan error, 10)
	l := New(filepath.Join(dir, "flows.jsonl"), func(err error) { problems <- err })
	l.Record(smolvm.FlowRecord{Kind: smolvm.FlowStart})
	if err := <-problems; !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the problem is %v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l.Record(smolvm.FlowRecord{Kind: smolvm.FlowStop})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	all := mustRead(t, filepath.Join(dir, "flows.jsonl"))
	if len(all) != 2 || all[0].Kind != smolvm.FlowLost || all[0].Lost != 1 || all[1].Kind != smolvm.FlowStop {
		t.Errorf("the log has %+v", all)
	}
}

// stuck is a disk that takes nothing until it is let go.
type stuck struct {
	io.WriteCloser
	entered, free chan struct{}
}

func (s *stuck) Write(p []byte) (int, error) {
	select {
	case s.entered <- struct{}{}:
	default:
	}
	<-s.free
	return s.WriteCloser.Write(p)
}

// A guest that makes flows faster than they can be written waits for nothing, and takes neither
// memory nor the places of those records that it has no part in.
func TestFlood(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "flows.jsonl")
	w := &writer{path: path, limit: FileBytes}
	if err := w.open(); err != nil {
		t.Fatal(err)
	}
	disk := &stuck{w.file, make(chan struct{}, 1), make(chan struct{})}
	w.file = disk
	l := newLog(w, nil)
	l.Record(smolvm.FlowRecord{Kind: smolvm.FlowStart})
	<-disk.entered // the disk is busy with it
	const flood = 50_000
	for range flood {
		l.Record(smolvm.FlowRecord{Kind: smolvm.FlowUDP, Event: smolvm.FlowDeny})
	}
	for range reserved {
		l.Record(smolvm.FlowRecord{Kind: smolvm.FlowExec})
	}
	close(disk.free)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	count := map[smolvm.FlowKind]int64{}
	for _, r := range mustRead(t, path) {
		count[r.Kind]++
		count["lost records"] += r.Lost
	}
	if count[smolvm.FlowExec] != reserved || count[smolvm.FlowUDP] != maxQueue-reserved ||
		count["lost records"] != flood-count[smolvm.FlowUDP] {
		t.Errorf("the log has %v", count)
	}
}

// Whoever follows a log sees each record once, over turns of it, and ends with the writer.
func TestFollow(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "flows.jsonl")
	w := &writer{path: path, limit: 64 << 10}
	l := newLog(w, nil)
	l.Record(smolvm.FlowRecord{Kind: smolvm.FlowStart})
	end := make(chan struct{})
	ended := func(ctx context.Context) error {
		select {
		case <-end:
		case <-ctx.Done():
		}
		return nil
	}
	for len(mustRead(t, path)) == 0 { // until there is a log to be followed
		time.Sleep(time.Millisecond)
	}
	const count = 600
	seen := int64(0)
	err := Read(t.Context(), path, smolvm.FlowOptions{Follow: true}, ended, func(r smolvm.FlowRecord) bool {
		if seen++; r.Number != seen {
			t.Errorf("record %d comes as number %d", r.Number, seen)
		}
		switch {
		case seen < count:
			l.Record(smolvm.FlowRecord{Kind: smolvm.FlowTCP})
		case seen == count:
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			close(end)
		}
		return true
	})
	if err != nil || seen != count {
		t.Errorf("%d records were seen, %v", seen, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = Read(ctx, path, smolvm.FlowOptions{Follow: true}, func(ctx context.Context) error { <-ctx.Done(); return nil },
		func(smolvm.FlowRecord) bool { cancel(); return true })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("following when the context is done: %v", err)
	}
}

func TestClean(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("é", maxText)
	for given, want := range map[string]string{
		"example.com": "example.com",
		"a b":         "a b",
		"\x1b[2J\x00": `\x1b[2J\x00`,
		"a\nb":        `a\nb`,
		"\xff\xfe":    `\xff\xfe`,
		"bücher":      "bücher",
		"\u202ex":     `\u202ex`,
		"\u009b31m":   `\u009b31m`,
		long:          strings.Repeat("é", maxText/2) + more,
		"x" + long:    "x" + strings.Repeat("é", maxText/2-1) + more,
	} {
		if got := Clean(smolvm.FlowRecord{Name: given}).Name; got != want {
			t.Errorf("%q becomes %q, want %q", given, got, want)
		}
	}
	many := slices.Repeat([]string{long}, 1000)
	r := Clean(smolvm.FlowRecord{Args: many, Answers: many, AskedNames: many, Secrets: many})
	if len(r.Args) > maxArgs+1 || len(r.Answers) > maxAnswers+1 || len(r.AskedNames) > maxNames+1 || r.AskedNames[maxNames-1] == "" {
		t.Errorf("lists have %d, %d and %d entries", len(r.Args), len(r.Answers), len(r.AskedNames))
	}
}

// The longest record fits into a line.
func TestLongest(t *testing.T) {
	t.Parallel()
	worst := strings.Repeat("\U000e0001", 1000) // whose escape is longest
	list := slices.Repeat([]string{worst}, 100)
	r := Clean(smolvm.FlowRecord{
		Kind: smolvm.FlowKind(worst), Event: smolvm.FlowEvent(worst), Verdict: smolvm.FlowVerdict(worst), Run: worst, Detail: worst,
		Address: worst, Place: worst, Name: worst, SNI: worst, HTTPHost: worst, Type: worst, Result: worst, Rule: worst, Reason: worst, Closed: worst,
		User: worst, Dir: worst, Signal: worst, Path: worst, AskedNames: list, Answers: list, Secrets: list, Args: list,
	})
	r.Prev = strings.Repeat("0", hashChars)
	if line, _, err := seal(r); err != nil {
		t.Error(err)
	} else {
		t.Logf("the longest line has %d bytes", len(line))
	}
}

// Whatever the lines are, the chain neither fails otherwise than it says, nor takes a record
// for another than was sealed.
func FuzzChain(f *testing.F) {
	line, hash, err := seal(smolvm.FlowRecord{Number: 1, Kind: smolvm.FlowDNS, Name: "example.com"})
	if err != nil {
		f.Fatal(err)
	}
	next, _, err := seal(smolvm.FlowRecord{Number: 2, Prev: hash, Kind: smolvm.FlowTCP, Address: "192.0.2.1:80"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(slices.Concat(line, next))
	f.Add(slices.Concat(next, line))
	f.Add(append(slices.Clone(line), next[:20]...))
	f.Add([]byte("{}\n\nnull\n" + hashBegin + hash + hashEnd + "\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		lines := bytes.SplitAfter(text, []byte("\n"))
		count := 0
		err := readLines(t.Context(), bytes.NewReader(text), smolvm.FlowOptions{}, func(r smolvm.FlowRecord) bool {
			sealed := bytes.TrimSuffix(lines[count], []byte("\n"))
			if hashOf(sealed[:len(sealed)-hashSize]) != r.Hash {
				t.Errorf("line %q passes as %+v", sealed, r)
			}
			count++
			return true
		})
		if err != nil && !errors.Is(err, smolvm.ErrFlowLogChanged) {
			t.Errorf("read: %v", err)
		}
		unverified := 0
		err = readLines(t.Context(), bytes.NewReader(text), smolvm.FlowOptions{Unverified: true}, func(smolvm.FlowRecord) bool {
			unverified++
			return true
		})
		if err != nil || unverified < count {
			t.Errorf("unverified it has %d records, and %d that fit; %v", unverified, count, err)
		}
	})
}

func BenchmarkRecord(b *testing.B) {
	l := New(filepath.Join(b.TempDir(), "flows.jsonl"), nil)
	r := smolvm.FlowRecord{
		Kind: smolvm.FlowTCP, Event: smolvm.FlowClose, Flow: 1, Address: "203.0.113.7:443", Name: "example.com", SNI: "example.com",
		AskedNames: []string{"example.com"}, Verdict: smolvm.FlowAllowed, Rule: "allow example.com:443/tcp", SentBytes: 100, ReceivedBytes: 2000,
	}
	for b.Loop() {
		l.Record(r)
	}
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkWrite(b *testing.B) {
	w := &writer{path: filepath.Join(b.TempDir(), "flows.jsonl"), limit: FileBytes}
	r := Clean(smolvm.FlowRecord{
		At: time.Now(), Kind: smolvm.FlowTCP, Event: smolvm.FlowClose, Flow: 1, Address: "203.0.113.7:443", Name: "example.com", SNI: "example.com",
		AskedNames: []string{"example.com"}, Verdict: smolvm.FlowAllowed, Rule: "allow example.com:443/tcp", SentBytes: 100, ReceivedBytes: 2000,
	})
	batch := slices.Repeat([]smolvm.FlowRecord{r}, 16)
	for b.Loop() {
		if err := w.write(batch); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(16*b.N), "ns/record")
}
