package ring_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/ring"
)

func open(t *testing.T, path string, limit int64) *ring.Log {
	t.Helper()
	log, err := ring.Open(path, limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	return log
}

func size(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func content(t *testing.T, path string) string {
	t.Helper()
	log, err := ring.NewReader(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	text, err := io.ReadAll(log)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func lines(from, to int) string {
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "line %d\n", i)
	}
	return b.String()
}

func TestLogIsBounded(t *testing.T) {
	const limit = 10_000
	for name, chunk := range map[string]string{
		"lines":       "a line of a log\n",
		"no line end": strings.Repeat("x", 999),
		"zeros":       string(make([]byte, 4096)),
		"large":       strings.Repeat("a line\n", 5000),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "log")
			log := open(t, path, limit)
			for written := 0; written < 500_000; written += len(chunk) {
				if _, err := io.WriteString(log, chunk); err != nil {
					t.Fatal(err)
				}
			}
			// A file may be longer by what is written until a line ends.
			if got := size(t, path) + size(t, ring.Previous(path)); got < limit || got > 2*(limit+64<<10+int64(len(chunk))) {
				t.Errorf("the log has %d bytes", got)
			}
			if got := content(t, path); !strings.HasSuffix(got, chunk) {
				t.Errorf("the log does not end with what was written last")
			}
		})
	}
}

func TestLogKeepsWholeLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	log := open(t, path, 1000)
	all := lines(0, 1000)
	for rest := []byte(all); len(rest) > 0; {
		n, _ := log.Write(rest[:min(7, len(rest))])
		rest = rest[n:]
	}
	got := content(t, path)
	if !strings.HasSuffix(all, got) || !strings.HasPrefix(got, "line ") || len(got) < 1000 {
		t.Errorf("the log holds %q", got)
	}
	for _, n := range []int{1, 10, 500, 1500, 1 << 20} {
		want := all[len(all)-min(n, len(got)):]
		if tail := log.Tail(n); tail != want {
			t.Errorf("Tail(%d) is %q, want %q", n, tail, want)
		}
	}
}

func TestTailIsOfThisLogOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("of an earlier run\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	log := open(t, path, 1000)
	if got := log.Tail(100); got != "" {
		t.Errorf("before a write the tail is %q", got)
	}
	_, _ = io.WriteString(log, "of this run\n")
	if got := log.Tail(100); got != "of this run\n" {
		t.Errorf("the tail is %q", got)
	}
	if got := content(t, path); got != "of an earlier run\nof this run\n" {
		t.Errorf("the log holds %q", got)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	if got := log.Tail(100); got != "of this run\n" {
		t.Errorf("the tail of a closed log is %q", got)
	}
	if _, err := io.WriteString(log, "too late"); err != nil {
		t.Errorf("a write after Close: %v", err)
	}
}

// A VM that is claimed from a pool has its log renamed while it is open.
func TestLogFollowsItsFile(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "slot", "console.log"), filepath.Join(dir, "vm", "console.log")
	for _, path := range []string{from, to} {
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	log := open(t, from, 1000)
	_, _ = io.WriteString(log, lines(0, 10))
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(log, lines(10, 500))
	if got := content(t, to); !strings.HasSuffix(got, "line 499\n") || size(t, ring.Previous(to)) > 1100 {
		t.Errorf("the log holds %q", got)
	}
	if left, _ := os.ReadDir(filepath.Dir(from)); len(left) != 0 {
		t.Errorf("beside its old name is %v", left)
	}
	// A deleted one stays bounded, though nobody can read it.
	if err := os.RemoveAll(filepath.Dir(to)); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(log, lines(500, 1000))
	if got := log.Tail(9); got != "line 999\n" {
		t.Errorf("the tail is %q", got)
	}
}

func TestOpenShrinksWhatGrewWithoutLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte(lines(0, 100_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	log := open(t, path, 1000)
	_, _ = io.WriteString(log, "new\n")
	if got := content(t, path); len(got) != 1004 || !strings.HasSuffix(got, "line 99999\nnew\n") {
		t.Errorf("the log has %d bytes: %q", len(got), got)
	}
}

func TestLogTellsOfWhatIsLost(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	log := ring.Over(full, 1000)
	_, _ = io.WriteString(log, "lost\n")
	// What /dev/full stands for has room again.
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	dup(t, file, full)
	_, _ = io.WriteString(log, "kept\n")
	if got, want := content(t, path), "\n[smolvm: 5 bytes of this log were lost: no space left on device]\nkept\n"; got != want {
		t.Errorf("the log holds %q, want %q", got, want)
	}
}

func TestReaderTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	log := open(t, path, 1000)
	_, _ = io.WriteString(log, lines(0, 50))
	_, _ = io.WriteString(log, lines(50, 200))
	all := content(t, path)
	if size(t, path) == 0 || !strings.HasPrefix(all, "line") {
		t.Fatalf("the log is %q", all)
	}
	count := strings.Count(all, "\n")
	for _, end := range []string{"", "the last line has no end"} {
		_, _ = io.WriteString(log, end)
		for _, n := range []int{1, 2, 10, count - 1, count, count + 5} {
			r, err := ring.NewReader(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.SeekTail(n); err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			want := strings.SplitAfter(strings.TrimSuffix(all, "\n"), "\n")
			want[len(want)-1] += "\n"
			if end != "" {
				want = append(want, end)
			}
			want = want[max(0, len(want)-n):]
			if got := string(text); got != strings.Join(want, "") {
				t.Errorf("the last %d lines are %q", n, got)
			}
			_ = r.Close()
		}
	}
}

func TestReaderFollowsAcrossFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	log := open(t, path, 10_000)
	_, _ = io.WriteString(log, lines(0, 1))
	r, err := ring.NewReader(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	ended := make(chan struct{})
	err = r.Follow(t.Context(), func(ctx context.Context) error {
		select {
		case <-ended:
		case <-ctx.Done():
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	const count = 20_000
	turn, read := make(chan struct{}), make(chan struct{}, 1)
	go func() {
		for i := 1; i < count; i++ {
			_, _ = fmt.Fprintf(log, "line %d\n", i)
			if i%500 == 0 { // the reader keeps pace: nothing may be missing then
				<-turn
			}
		}
		close(ended)
	}()
	go func() {
		defer close(turn)
		for range read {
			turn <- struct{}{}
		}
	}()
	var got bytes.Buffer
	buffer := make([]byte, 1000)
	for {
		n, err := r.Read(buffer)
		got.Write(buffer[:n])
		if bytes.HasSuffix(got.Bytes(), []byte("00\n")) {
			last := got.Bytes()[max(0, got.Len()-20):]
			var i int
			if at := bytes.LastIndex(last, []byte("line ")); at >= 0 {
				_, _ = fmt.Sscanf(string(last[at:]), "line %d\n", &i)
			}
			if i > 0 && i%500 == 0 {
				read <- struct{}{}
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	close(read)
	if want := lines(0, count); got.String() != want {
		t.Errorf("read %d bytes, want %d", got.Len(), len(want))
	}
}

// A reader that is left behind goes on with what is there, and one whose context is done
// ends.
func TestReaderLeftBehind(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	log := open(t, path, 1000)
	_, _ = io.WriteString(log, lines(0, 1))
	r, err := ring.NewReader(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := r.Follow(ctx, func(ctx context.Context) error { <-ctx.Done(); return nil }); err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		_, _ = fmt.Fprintf(log, "line %d\n", i+1)
	}
	var got string
	buffer := make([]byte, 1000)
	for !strings.HasSuffix(got, "line 1000\n") {
		n, err := r.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		got += string(buffer[:n])
	}
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := r.Read(buffer); !errors.Is(err, context.Canceled) {
		t.Errorf("a reader that was given up returns %v", err)
	}
}

func TestPump(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	log := open(t, path, 1<<20)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	hurry, done := make(chan struct{}), make(chan struct{})
	go func() { log.Pump(r, hurry); close(done) }()
	if err := w.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	flood := bytes.Repeat([]byte("0123456789abcde\n"), 1<<18)
	n, err := w.Write(flood)
	if err == nil || n > 64<<10+300_000 {
		t.Errorf("a flood of half a second got rid of %d bytes (%v)", n, err)
	}
	close(hurry)
	_ = w.Close()
	<-done
	if got := content(t, path); got != string(flood[:n]) {
		t.Errorf("of %d bytes %d are in the log", n, len(got))
	}
}

func TestAppend(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for range 100 {
		file, err := ring.Append(path, 1000)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(file, lines(0, 10))
		_ = file.Close()
	}
	if a, b := size(t, path), size(t, ring.Previous(path)); a > 1100 || b > 1100 {
		t.Errorf("the log has %d and %d bytes", a, b)
	}
}
