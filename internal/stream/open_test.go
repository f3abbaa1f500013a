package stream

import (
	"io"
	"testing"
)

type closeFunc func()

func (f closeFunc) Close() error {
	f()
	return nil
}

// What is kept is closed once: by itself, or with the others, or at once if these are closed.
func TestOpen(t *testing.T) {
	t.Parallel()
	var open Open
	counts := map[string]int{}
	keep := func(name string) io.Closer { return open.Keep(closeFunc(func() { counts[name]++ })) }
	early := keep("early")
	keep("with the others")
	_ = early.Close()
	if !open.Close() || open.Close() {
		t.Error("only the first Close is the first")
	}
	late := keep("late")
	for _, name := range []string{"early", "with the others", "late"} {
		if counts[name] != 1 {
			t.Errorf("%s was closed %d times", name, counts[name])
		}
	}
	if open.Add(late) {
		t.Error("something is added to what is closed")
	}
}
