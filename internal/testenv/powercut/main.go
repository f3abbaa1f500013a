// Command powercut changes a data directory as a manager does, in a guest whose power is
// cut in the middle of that. "work DIR" prints a line for each thing that is to outlast it,
// when the manager would say that it is done; "check DIR" reads those lines, and prints what
// of it is not so.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/store"
)

func main() {
	if err := run(context.Background(), os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// site is a data directory with the state and the disks in it.
type site struct {
	dir   *datadir.Dir
	state *store.Store
	disks *backing.Disks
	image string
}

func run(ctx context.Context, what, path string) error {
	dir, err := datadir.Open(datadir.Options{Path: path})
	if err != nil {
		return err
	}
	state, err := store.Open(ctx, dir.Database(), store.Options{})
	if err != nil {
		return err
	}
	s := site{dir: dir, state: state, disks: backing.New(dir, state.Bases())}
	s.image = filepath.Join(dir.Images(), strings.Repeat("ab", 32), "rootfs")
	if what == "check" {
		return s.check(ctx)
	}
	if err := os.MkdirAll(filepath.Dir(s.image), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(s.image, make([]byte, 1<<20), 0o600); err != nil {
		return err
	}
	if err := s.disks.Persist(s.image); err != nil {
		return err
	}
	fmt.Println("begun")
	for i := 0; ; i++ {
		if err := s.work(ctx, i); err != nil {
			return err
		}
	}
}

// work takes one VM through its life, and the one before the last to its end.
func (s site) work(ctx context.Context, i int) error {
	id := fmt.Sprintf("vm-%d", i)
	path := s.dir.Disk(id, "qcow2")
	vm, err := s.state.CreateVM(ctx, store.NewVM{
		Config: smolvm.VMConfig{ID: id}.WithDefaults(), DiskPath: path, Base: s.image, LogPath: s.dir.Console(id),
	})
	if err != nil {
		return err
	}
	if err := s.disks.Create(ctx, backing.Disk{Path: path, Base: s.image, BaseFormat: disk.Raw}); err != nil {
		return err
	}
	if err := s.disks.Persist(path); err != nil {
		return err
	}
	if err := s.state.MarkStarted(ctx, id, store.Started{Run: "run-" + id, At: time.Now()}); err != nil {
		return err
	}
	fmt.Println("started", id, vm.Lease, vm.SSHPort)
	if i%2 == 0 {
		if err := s.save(ctx, id, path); err != nil {
			return err
		}
		fmt.Println("saved", id)
	}
	if i%3 == 2 {
		gone := fmt.Sprintf("vm-%d", i-2)
		fmt.Println("going", gone) // from here on it may be there or not
		if err := os.Remove(s.dir.Disk(gone, "qcow2")); err != nil {
			return err
		}
		if err := s.state.DeleteVM(ctx, gone); err != nil {
			return err
		}
		fmt.Println("deleted", gone)
	}
	return nil
}

// save makes the disk of a VM a layer, with an overlay in its place.
func (s site) save(ctx context.Context, id, path string) error {
	unlock, err := s.disks.Lock(ctx)
	if err != nil {
		return err
	}
	err = s.disks.AddLayer(ctx, path, "layer-"+id)
	unlock()
	if err != nil {
		return err
	}
	layer := s.dir.Layer("layer-"+id, disk.QCOW2)
	err = s.disks.Derive(ctx, backing.Disk{Path: path, Base: layer, BaseFormat: disk.QCOW2, Replace: true, Sync: true})
	if err != nil {
		return err
	}
	return s.state.Bases().Persist(ctx, path, layer)
}

// check prints what is not as the lines on standard input say.
func (s site) check(ctx context.Context) error {
	said := map[string]string{} // by id: the last that was said of a VM that was started
	saved := map[string]bool{}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		verb, rest, _ := strings.Cut(lines.Text(), " ")
		id, numbers, _ := strings.Cut(rest, " ")
		switch verb {
		case "started":
			said[id] = numbers
		case "saved":
			saved[id] = true
		case "going":
			delete(said, id)
		case "deleted":
			said[id] = verb
		}
	}
	for id, what := range said {
		if err := s.checkVM(ctx, id, what, saved[id]); err != nil {
			fmt.Printf("%s: %v\n", id, err)
		}
	}
	all, err := s.state.ListVMs(ctx, "")
	if err != nil {
		return err
	}
	fmt.Printf("checked %d of %d\n", len(said), len(all))
	return errors.Join(lines.Err(), s.disks.Collect(ctx))
}

func (s site) checkVM(ctx context.Context, id, want string, saved bool) error {
	vm, err := s.state.GetVM(ctx, id)
	path := s.dir.Disk(id, "qcow2")
	if want == "deleted" {
		if !errors.Is(err, smolvm.ErrVMNotFound) {
			return fmt.Errorf("it was deleted, and is %s, %w", vm.State, err)
		}
		if _, err := os.Lstat(path); err == nil {
			return errors.New("it was deleted, and its disk is there")
		}
		return nil
	}
	if err != nil {
		return err
	}
	if got := fmt.Sprint(vm.Lease, " ", vm.SSHPort); got != want || vm.State != smolvm.StateRunning || vm.Run != "run-"+id {
		return fmt.Errorf("it is %s, in run %q, with %s; want %s", vm.State, vm.Run, got, want)
	}
	chain, err := s.disks.Chain(path)
	if err != nil {
		return err
	}
	files := []string{s.image}
	if saved {
		files = []string{s.dir.Layer("layer-"+id, disk.QCOW2), s.image}
	}
	for i, file := range chain {
		if i < len(chain)-len(files) {
			continue // a saving that it had no time to tell of
		}
		if want := files[i-(len(chain)-len(files))]; file.Path != want {
			return fmt.Errorf("its disk is based on %v, want %v", chain, files)
		}
	}
	if len(chain) < len(files) {
		return fmt.Errorf("its disk is based on %v, want %v", chain, files)
	}
	based, err := s.state.Bases().On(ctx, files[0])
	if err == nil && !slices.Contains(based, path) {
		err = fmt.Errorf("it is not written down that %s is based on %s", path, files[0])
	}
	return err
}
