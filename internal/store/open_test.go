package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

func TestOpenMakesPrivateFiles(t *testing.T) {
	t.Parallel()
	// A path with all that means something in a URI.
	path := filepath.Join(t.TempDir(), "a b%20c?d#e&f=g", "smolvm.db")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	s := reopen(t, path, Options{})
	mustCreate(t, s, newVM("web"))
	if s.Path() != path {
		t.Errorf("Path = %s, want %s", s.Path(), path)
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		info, err := os.Stat(path + suffix)
		if err != nil {
			t.Error(err)
		} else if info.Mode() != 0o600 {
			t.Errorf("mode of %s = %v, want -rw-------", info.Name(), info.Mode())
		}
	}
}

func TestCloseTwice(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.GetVM(t.Context(), "web"); err == nil {
		t.Error("a closed store answers")
	}
}

// TestTwoStoresInOneProcess would find it if one store's Close, or Open, took away
// the locks of the other.
func TestTwoStoresInOneProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "smolvm.db")
	a := reopen(t, path, Options{})
	for i := range 20 {
		b := reopen(t, path, Options{})
		mustCreate(t, a, newVM(fmt.Sprintf("a-%d", i)))
		mustCreate(t, b, newVM(fmt.Sprintf("b-%d", i)))
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	checkDistinct(t, a, 40)
}

func TestMigrate(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "smolvm.db")
	steps := []string{
		"CREATE TABLE a (x INTEGER); INSERT INTO a VALUES (1);",
		"ALTER TABLE a ADD COLUMN y INTEGER; UPDATE a SET y = x + 1;",
		"CREATE TABLE b AS SELECT y + 1 AS z FROM a;",
	}
	// A step runs once, whichever version the database comes from.
	for _, count := range []int{1, 3, 3} {
		s, err := open(t.Context(), path, Options{}, steps[:count])
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	s, err := open(t.Context(), path, Options{}, steps)
	if err != nil {
		t.Fatal(err)
	}
	var z int
	if err := s.read.QueryRowContext(t.Context(), "SELECT sum(z) FROM b").Scan(&z); err != nil || z != 3 {
		t.Errorf("z = %d, %v; want 3", z, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestFailedMigrationChangesNothing(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "smolvm.db")
	_, err := open(t.Context(), path, Options{}, []string{"CREATE TABLE a (x)", "CREATE TABLE b (x); nonsense"})
	if err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Fatalf("error = %v, want one that names version 2", err)
	}
	s, err := open(t.Context(), path, Options{}, []string{"CREATE TABLE a (x)"})
	if err != nil {
		t.Fatalf("the failed migration left something: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOpenAtTheSameTime(t *testing.T) {
	t.Parallel()
	for range 20 {
		path := filepath.Join(t.TempDir(), "smolvm.db")
		var group sync.WaitGroup
		for i := range 4 {
			group.Go(func() {
				s, err := Open(t.Context(), path, Options{})
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := s.CreateVM(t.Context(), newVM(fmt.Sprintf("vm-%d", i))); err != nil {
					t.Error(err)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
	}
}

// newest is the version of the schema.
func newest(t *testing.T) int {
	t.Helper()
	steps, err := migrations()
	if err != nil {
		t.Fatal(err)
	}
	return len(steps)
}

func TestDatabaseTooNew(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	if _, err := s.write.ExecContext(t.Context(), "PRAGMA user_version = 99"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before := readFile(t, s.Path())
	_, tooNew := Open(t.Context(), s.Path(), Options{})
	if !errors.Is(tooNew, smolvm.ErrDatabaseTooNew) {
		t.Fatalf("error = %v, want ErrDatabaseTooNew", tooNew)
	}
	for _, part := range []string{"version 99", fmt.Sprintf("up to %d", newest(t)), "upgrade smolvm", s.Path()} {
		if !strings.Contains(tooNew.Error(), part) {
			t.Errorf("error %q does not say %q", tooNew, part)
		}
	}
	if !bytes.Equal(readFile(t, s.Path()), before) {
		t.Error("the file has changed")
	}
}

func TestDatabaseCorrupt(t *testing.T) {
	t.Parallel()
	whole := func() []byte {
		s := openTemp(t, Options{})
		for i := range 50 {
			mustCreate(t, s, newVM(fmt.Sprintf("vm-%d", i)))
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return readFile(t, s.Path())
	}()
	scribbled := bytes.Clone(whole)
	for i := 4096; i < len(scribbled); i++ {
		scribbled[i] = 0xa5
	}
	for name, content := range map[string][]byte{
		"garbage":        bytes.Repeat([]byte("not a database. "), 1000),
		"short garbage":  []byte("oops"),
		"half":           whole[:len(whole)/2/4096*4096],
		"last page gone": whole[:len(whole)-4096],
		"header only":    whole[:100],
		"scribbled":      scribbled,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "smolvm.db")
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			err := useAll(t.Context(), path)
			if !errors.Is(err, smolvm.ErrDatabaseCorrupt) {
				t.Fatalf("error = %v, want ErrDatabaseCorrupt", err)
			}
			for _, part := range []string{path, "move it away", "disks are not touched"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %q does not say %q", err, part)
				}
			}
			if !bytes.Equal(readFile(t, path), content) {
				t.Error("the file has changed")
			}
		})
	}
}

// useAll opens a database and reads all VMs.
func useAll(ctx context.Context, path string) error {
	s, err := Open(ctx, path, Options{})
	if err != nil {
		return err
	}
	_, err = s.ListVMs(ctx, "")
	return errors.Join(err, s.Close())
}

func TestReadOnlyDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	// Others must be able to get there.
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	present := reopen(t, filepath.Join(dir, "present.db"), Options{})
	if err := present.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(present.Path(), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o555); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(dir, 0o700) })
	for name, want := range map[string]string{
		"missing.db": "permission denied",
		"present.db": "both the file and its directory must be readable and writable",
	} {
		path := filepath.Join(dir, name)
		var err error
		withoutPrivilege(func() { err = useAll(t.Context(), path) })
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: error = %v, want one that names the path and says %q", name, err, want)
		}
	}
}

// withoutPrivilege runs f on a thread that has no more rights to files than anybody.
func withoutPrivilege(f func()) {
	var group sync.WaitGroup
	group.Go(func() {
		if os.Getuid() == 0 {
			runtime.LockOSThread() // and never unlocked, so that the thread ends here
			_ = unix.Setfsuid(65534)
		}
		f()
	})
	group.Wait()
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// childEnv holds the path of a database in processes that the tests start.
const childEnv = "SMOLVM_STORE_TEST_DATABASE"

const (
	children       = 4
	createsPerTest = 50
)

// runChild opens a database, together with its siblings, and creates VMs.
func runChild(path string) int {
	_, _ = os.Stdin.Read(make([]byte, 1)) // returns when the parent has started us all
	ctx := context.Background()
	s, err := Open(ctx, path, Options{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for i := range createsPerTest {
		if _, err := s.CreateVM(ctx, newVM(fmt.Sprintf("vm-%d-%d", os.Getpid(), i))); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	if err := s.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// TestProcesses has several processes open a fresh database and create VMs, all at
// the same time.
func TestProcesses(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "smolvm.db")
	startLine, release, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var processes []*exec.Cmd
	for range children {
		process := exec.CommandContext(t.Context(), os.Args[0])
		process.Env = append(os.Environ(), childEnv+"="+path)
		process.Stdin = startLine
		process.Stderr = &bytes.Buffer{}
		if err := process.Start(); err != nil {
			t.Fatal(err)
		}
		processes = append(processes, process)
	}
	if err := errors.Join(startLine.Close(), release.Close()); err != nil {
		t.Fatal(err)
	}
	for _, process := range processes {
		if err := process.Wait(); err != nil {
			t.Errorf("%v: %s", err, process.Stderr)
		}
	}
	checkDistinct(t, reopen(t, path, Options{}), children*createsPerTest)
}

// checkDistinct checks that the VMs have the lowest leases and SSH ports, each its
// own.
func checkDistinct(t *testing.T, s *Store, count int) {
	t.Helper()
	vms, err := s.ListVMs(t.Context(), "")
	if err != nil || len(vms) != count {
		t.Fatalf("%d VMs, %v; want %d", len(vms), err, count)
	}
	leases, ports := map[int]bool{}, map[int]bool{}
	for _, vm := range vms {
		if leases[vm.Lease] || vm.Lease < 2 || vm.Lease >= 2+count {
			t.Errorf("VM %s has lease %d", vm.ID, vm.Lease)
		}
		if ports[vm.SSHPort] || vm.SSHPort < 2200 || vm.SSHPort >= 2200+count {
			t.Errorf("VM %s has port %d", vm.ID, vm.SSHPort)
		}
		leases[vm.Lease], ports[vm.SSHPort] = true, true
	}
}
