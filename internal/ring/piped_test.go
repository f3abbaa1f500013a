package ring

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// What a program has written before its end is in the log when it was drained, and was shown
// to who watches.
func TestPiped(t *testing.T) {
	t.Parallel()
	log, end, err := OpenPiped(filepath.Join(t.TempDir(), "log"), LogBytes)
	if err != nil {
		t.Fatal(err)
	}
	var seen strings.Builder
	log.Start(&seen)
	want := strings.Repeat("a line\n", 1000) // more than one chunk
	if _, err := fmt.Fprint(end, want); err != nil {
		t.Fatal(err)
	}
	if err := end.Close(); err != nil {
		t.Fatal(err)
	}
	log.Drain()
	if got := log.Tail(2 * len(want)); got != want || seen.String() != want {
		t.Errorf("the log has %d bytes, and %d were seen, of %d", len(got), seen.Len(), len(want))
	}
	if err := log.Close(); err != nil {
		t.Error(err)
	}
}
