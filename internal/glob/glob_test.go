package glob

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestIn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "[a]*?\\")
	for _, name := range []string{"one/x.log", "two/x.log", "two/y"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for pattern, want := range map[string][]string{
		"*/*.log": {dir + "/one/x.log", dir + "/two/x.log"},
		"two/y":   {dir + "/two/y"},
		"three/*": nil,
	} {
		if got, err := In(dir, pattern); err != nil || !slices.Equal(got, want) {
			t.Errorf("In(%q) = %q, %v, want %q", pattern, got, err, want)
		}
	}
	if got, err := In(filepath.Join(dir, "missing"), "*"); err != nil || len(got) > 0 {
		t.Errorf("of a directory that is not there: %q, %v", got, err)
	}
	if _, err := In(dir, "["); err == nil {
		t.Error("a malformed pattern is no error")
	}
}
