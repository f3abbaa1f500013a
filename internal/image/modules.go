package image

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// wanted lists the modules that a guest needs, unless its kernel has them built in;
// what they depend on comes before them. All are there for any machine, so that one
// image boots on each.
func wanted() []wire.Module {
	return []wire.Module{
		{Path: "virtio_mmio", Transport: "mmio", Use: wire.UseBoot},
		{Path: "virtio_pci", Transport: "pci", Use: wire.UseBoot},
		{Path: "virtio_console", Use: wire.UsePort},
		{Path: "virtio_blk", Use: wire.UseBoot},
		{Path: "ext4", Use: wire.UseBoot},
		{Path: "vsock", Use: wire.UseVsock},
		{Path: "vmw_vsock_virtio_transport", Use: wire.UseVsock},
		{Path: "virtio_net", Use: wire.UseLate},
		{Path: "virtio_rng", Use: wire.UseLate},
		{Path: "fuse", Use: wire.UseDemand},
		{Path: "overlay", Use: wire.UseDemand},
	}
}

// modulesDir is where an initramfs keeps its modules.
const modulesDir = "/lib/smolvm"

// moduleSet is a kernel's modules, by name.
type moduleSet struct {
	paths   map[string]string
	builtin map[string]bool
}

// moduleName returns the name by which the kernel knows a module's file.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// findModules indexes a tree such as /lib/modules/<release>. An empty dir has none:
// the kernel must have all built in.
func findModules(dir string) (moduleSet, error) {
	set := moduleSet{paths: map[string]string{}, builtin: map[string]bool{}}
	if dir == "" {
		return set, nil
	}
	err := filepath.WalkDir(dir, func(file string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.Name() == "modules.builtin":
			if len(set.builtin) > 0 {
				return fmt.Errorf("%s has modules of several kernels; give the folder of one", dir)
			}
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(text)) {
				set.builtin[moduleName(strings.TrimSpace(line))] = true
			}
		case entry.Type().IsRegular() && strings.Contains(entry.Name(), ".ko"):
			set.paths[moduleName(entry.Name())] = file
		}
		return nil
	})
	if err != nil {
		return set, fmt.Errorf("find modules: %w", err)
	}
	return set, nil
}

// loadOrder returns what to load, in order, and the modules' contents by path.
func (s moduleSet) loadOrder() ([]wire.Module, map[string][]byte, error) {
	list := loadList{set: s, order: []wire.Module{}, contents: map[string][]byte{}, needs: map[string][]string{}}
	for _, module := range wanted() {
		if s.paths[module.Path] == "" {
			// Built in, or not of this kernel: what is really missing shows when
			// the guest boots, and it says so.
			continue
		}
		if err := list.add(module); err != nil {
			return nil, nil, err
		}
	}
	return list.order, list.contents, nil
}

// loadList is a loadOrder in the making.
type loadList struct {
	set      moduleSet
	order    []wire.Module
	contents map[string][]byte   // by path
	needs    map[string][]string // names, by name
}

// add adds a module, whose Path is its name, after those that it needs.
func (l *loadList) add(module wire.Module) error {
	name := module.Path
	if l.set.builtin[name] {
		return nil
	}
	module.Path = path.Join(modulesDir, name+".ko")
	if l.contents[module.Path] != nil {
		l.share(name, module)
		return nil
	}
	if l.set.paths[name] == "" {
		return fmt.Errorf("module %s is neither there nor built into the kernel", name)
	}
	content, err := readModule(l.set.paths[name])
	if err != nil {
		return err
	}
	needs, err := dependencies(content)
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	l.contents[module.Path], l.needs[name] = content, needs
	for _, need := range needs {
		if err := l.add(wire.Module{Path: need, Transport: module.Transport, Use: module.Use}); err != nil {
			return fmt.Errorf("module %s needs another: %w", name, err)
		}
	}
	l.order = append(l.order, module)
	return nil
}

// share notes that a module on the list, and so all that it needs, is needed by another
// module, which may be for another bus or another use.
func (l *loadList) share(name string, by wire.Module) {
	for i, there := range l.order {
		if there.Path != path.Join(modulesDir, name+".ko") {
			continue
		}
		both := there
		if by.Transport != both.Transport {
			both.Transport = ""
		}
		if by.Use != both.Use {
			both.Use = wire.UseBoot // before any other
		}
		if both == there {
			continue
		}
		l.order[i] = both
		for _, need := range l.needs[name] {
			l.share(need, both)
		}
	}
}

// dependencies reads the names of the modules that one needs from the module itself;
// packages hold no list of them, as that is made when they are installed.
func dependencies(module []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, nil
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var names []string
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		list, ok := strings.CutPrefix(string(entry), "depends=")
		if !ok {
			continue
		}
		for name := range strings.SplitSeq(list, ",") {
			if name != "" {
				names = append(names, strings.ReplaceAll(name, "-", "_"))
			}
		}
	}
	return names, nil
}
