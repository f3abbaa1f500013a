package launcher

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/smolvm/smolvm/internal/namespace"
)

// Where an owner can't be shown as another user, the file itself lets that user in: by its group
// if it is written to, and not at all if it may be others' too.
func TestLetUser(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("changing a file's group takes root")
	}
	const user = 123456
	for name, test := range map[string]struct {
		mode     os.FileMode
		owner    int
		readOnly bool
		want     os.FileMode
		group    uint32
		says     string
	}{
		"written to":             {0o600, 0, false, 0o660, user, ""},
		"another's":              {0o600, 1000, false, 0o600, 0, "must be user 0's own"},
		"read by all":            {0o644, 1000, true, 0o644, 0, ""},
		"read by its owner only": {0o600, 0, true, 0o600, 0, "must be readable by everybody"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(path, nil, test.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chown(path, test.owner, 0); err != nil {
				t.Fatal(err)
			}
			err := letUser(namespace.Mount{Source: path, User: user, ReadOnly: test.readOnly})
			if (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
				t.Errorf("error is %v", err)
			}
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			stat := info.Sys().(*syscall.Stat_t) //nolint:forcetypeassert // on Linux
			if info.Mode() != test.want || stat.Gid != test.group || int(stat.Uid) != test.owner {
				t.Errorf("it is of user %d and group %d, %v", stat.Uid, stat.Gid, info.Mode())
			}
		})
	}
}
