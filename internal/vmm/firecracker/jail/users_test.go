package jail_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/jail"
)

// hostWith returns the root of a host that has some users.
func hostWith(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	all := map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\n", "etc/group": "root:x:0:\n",
		"proc/self/uid_map": "         0          0 4294967295\n", "proc/self/gid_map": "         0          0 4294967295\n",
	}
	maps.Copy(all, files)
	for name, text := range all {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// takeAll takes users until there are no more.
func takeAll(t *testing.T, users jail.Users) (ids map[int]bool, err error) {
	t.Helper()
	ids = map[int]bool{}
	for {
		user, err := users.Take()
		if err != nil {
			return ids, err
		}
		t.Cleanup(user.Release)
		if ids[user.ID()] {
			t.Errorf("user %d is given to two", user.ID())
		}
		ids[user.ID()] = true
	}
}

// Each jail has a user that nobody else has: neither another jail, nor the host.
func TestUsers(t *testing.T) {
	t.Parallel()
	root := hostWith(t, map[string]string{
		"etc/passwd": "# a comment\nroot:x:0:0::/root:/bin/sh\n+\nvm:x:1000:7::/:/bin/sh\n",
		"etc/group":  "root:x:0:\nvms:x:1002:vm,root\n",
		"etc/subuid": "vm:1003:2\n",
		"etc/subgid": "vm:1009:65536\n",
	})
	users := jail.Users{First: 1000, Count: 12, Locks: filepath.Join(root, "run", "locks"), Root: root}
	ids, err := takeAll(t, users)
	for _, id := range []int{1001, 1005, 1006, 1007, 1008} {
		if !ids[id] {
			t.Errorf("user %d is given to nobody", id)
		}
	}
	if len(ids) != 5 {
		t.Errorf("users %v are given", ids)
	}
	if _, ok := errors.AsType[*smolvm.Error](err); !ok || !strings.Contains(err.Error(), "1000 to 1011 are in use") {
		t.Errorf("error is %v", err)
	}
}

// A user that was released is another's.
func TestUsersReleased(t *testing.T) {
	t.Parallel()
	root := hostWith(t, nil)
	users := jail.Users{First: 5000, Count: 1, Locks: filepath.Join(root, "locks"), Root: root}
	for range 3 {
		user, err := users.Take()
		if err != nil || user.ID() != 5000 {
			t.Fatalf("%v, %v", user, err)
		}
		if _, err := users.Take(); err == nil {
			t.Error("a user is given to two")
		}
		user.Release()
	}
}

// Where the host's users can't be read, or there are none to give, nobody gets one.
func TestNoUsers(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		files map[string]string
		want  string
	}{
		"a container": {map[string]string{"proc/self/uid_map": "0 100000 65536\n", "proc/self/gid_map": "0 100000 65536\n"}, "this container has no users"},
		"groups only": {map[string]string{"proc/self/uid_map": "0 100000 65536\n"}, "this container has no users"},
		"a bad line":  {map[string]string{"etc/passwd": "root\n"}, "/etc/passwd: unexpected text"},
		"a bad id":    {map[string]string{"etc/subuid": "vm:x:1\n"}, "/etc/subuid"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := hostWith(t, test.files)
			user, err := jail.Users{Locks: filepath.Join(root, "locks"), Root: root}.Take()
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, %v", user, err)
			}
		})
	}
}
