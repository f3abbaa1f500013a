package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// demandedModules are modules of the kernel that are loaded when something asks for them. The
// zero value has none.
type demandedModules struct {
	mu    sync.Mutex
	files map[string]*os.File // open, as the file system that they are in goes; by name
}

// keep opens a module.
func (d *demandedModules) keep(module wire.Module) error {
	file, err := os.Open(module.Path)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.files == nil {
		d.files = map[string]*os.File{}
	}
	d.files[strings.TrimSuffix(path.Base(module.Path), ".ko")] = file
	return nil
}

// load loads a module, unless that was done. What is built into the kernel is none.
func (d *demandedModules) load(name string) error {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	file := d.files[name]
	if file == nil {
		return nil
	}
	delete(d.files, name)
	if err := insertModule(file); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("load what the kernel needs for it: %w", err)
	}
	return nil
}
