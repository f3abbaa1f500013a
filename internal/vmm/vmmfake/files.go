package vmmfake

import (
	"cmp"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// node is a file, a directory or a symbolic link.
type node struct {
	Mode    fs.FileMode `json:"mode"`
	Data    []byte      `json:"data,omitempty"`
	Link    string      `json:"link,omitempty"`
	ModTime time.Time   `json:"mod_time"`
}

// files is a guest's tree of files. Paths are absolute.
type files struct {
	mu    sync.Mutex // guards the following
	nodes map[string]*node
}

// volatile are the directories that are never on a disk.
var volatile = []string{"/dev", "/proc", "/run", "/sys", "/tmp"}

func isVolatile(name string) bool {
	return slices.ContainsFunc(volatile, func(dir string) bool { return strings.HasPrefix(name, dir+"/") })
}

func newFiles() *files {
	f := &files{nodes: map[string]*node{"/": {Mode: fs.ModeDir | 0o755}}}
	for _, dir := range append([]string{"/bin", "/etc", "/mnt", "/root"}, volatile...) {
		f.nodes[dir] = &node{Mode: fs.ModeDir | 0o755, ModTime: time.Now()}
	}
	for name := range programs {
		f.nodes["/bin/"+name] = &node{Mode: 0o755, Data: []byte(programMark + name + "\n"), ModTime: time.Now()}
	}
	return f
}

// copy returns the nodes that are on a disk, or all of them.
func (f *files) copy(all bool) map[string]*node {
	f.mu.Lock()
	defer f.mu.Unlock()
	nodes := map[string]*node{}
	for name, n := range f.nodes {
		if all || !isVolatile(name) {
			one := *n
			one.Data = slices.Clone(n.Data)
			nodes[name] = &one
		}
	}
	return nodes
}

// resolve follows symbolic links, those of the last part too if last is set.
func (f *files) resolve(name string, last bool) (string, error) {
	name = path.Clean("/" + name)
	for range 40 {
		done := true
		parts := strings.Split(name[1:], "/")
		for i := range parts {
			at := "/" + path.Join(parts[:i+1]...)
			n := f.nodes[at]
			if n == nil || n.Mode&fs.ModeSymlink == 0 || i == len(parts)-1 && !last {
				continue
			}
			target := n.Link
			if !path.IsAbs(target) {
				target = path.Join(path.Dir(at), target)
			}
			name, done = path.Join(append([]string{target}, parts[i+1:]...)...), false
			break
		}
		if done {
			return name, nil
		}
	}
	return "", &fs.PathError{Op: "open", Path: name, Err: syscall.ELOOP}
}

// get finds a node. It is called with the lock held.
func (f *files) get(op, name string, follow bool) (string, *node, error) {
	at, err := f.resolve(name, follow)
	if err != nil {
		return "", nil, err
	}
	n := f.nodes[at]
	if n == nil {
		return at, nil, &fs.PathError{Op: op, Path: name, Err: syscall.ENOENT}
	}
	return at, n, nil
}

// stat returns what a node is, without its content.
func (f *files) stat(name string, follow bool) (info, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, n, err := f.get("stat", name, follow)
	if err != nil {
		return info{}, err
	}
	return info{path.Base(at), int64(len(n.Data)), *n}, nil
}

// list returns what is in a directory, by name.
func (f *files) list(name string) ([]info, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, n, err := f.get("open", name, true)
	switch {
	case err != nil:
		return nil, err
	case !n.Mode.IsDir():
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.ENOTDIR}
	}
	var found []info
	for name, n := range f.nodes {
		if name != "/" && path.Dir(name) == at {
			found = append(found, info{path.Base(name), int64(len(n.Data)), *n})
		}
	}
	slices.SortFunc(found, func(a, b info) int { return cmp.Compare(a.name, b.name) })
	return found, nil
}

func (f *files) read(name string) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, n, err := f.get("open", name, true)
	switch {
	case err != nil:
		return nil, err
	case n.Mode.IsDir():
		return nil, &fs.PathError{Op: "read", Path: name, Err: syscall.EISDIR}
	}
	return slices.Clone(n.Data), nil
}

// put makes a node, or replaces one. Its directory must be there.
func (f *files) put(name string, n node) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, err := f.resolve(name, false)
	if err != nil {
		return err
	}
	if dir := f.nodes[path.Dir(at)]; dir == nil || !dir.Mode.IsDir() {
		return &fs.PathError{Op: "open", Path: name, Err: syscall.ENOENT}
	}
	if n.ModTime.IsZero() {
		n.ModTime = time.Now()
	}
	if old := f.nodes[at]; old != nil && old.Mode.IsDir() && !n.Mode.IsDir() {
		return &fs.PathError{Op: "open", Path: name, Err: syscall.EISDIR}
	}
	f.nodes[at] = &n
	return nil
}

// write is put of a file that the guest's own code writes, directories and all.
func (f *files) write(name, text string) {
	f.mkdirAll(path.Dir(name))
	_ = f.put(name, node{Mode: 0o644, Data: []byte(text)})
}

func (f *files) mkdirAll(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for at := path.Clean(name); at != "/"; at = path.Dir(at) {
		if f.nodes[at] == nil {
			f.nodes[at] = &node{Mode: fs.ModeDir | 0o755, ModTime: time.Now()}
		}
	}
}

// change changes a node in place.
func (f *files) change(name string, edit func(*node)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, n, err := f.get("open", name, true)
	if err == nil {
		edit(n)
	}
	return err
}

// remove removes a node, and all that is below it.
func (f *files) remove(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, _, err := f.get("remove", name, false)
	if err != nil {
		return err
	}
	maps.DeleteFunc(f.nodes, func(name string, _ *node) bool { return name == at || strings.HasPrefix(name, at+"/") })
	return nil
}

func (f *files) rename(from, to string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, _, err := f.get("rename", from, false)
	if err != nil {
		return err
	}
	target, err := f.resolve(to, true)
	if err != nil {
		return err
	}
	if n := f.nodes[target]; n != nil && n.Mode.IsDir() {
		target = path.Join(target, path.Base(at))
	}
	moved := map[string]*node{}
	for name, n := range f.nodes {
		if name == at || strings.HasPrefix(name, at+"/") {
			moved[target+strings.TrimPrefix(name, at)] = n
			delete(f.nodes, name)
		}
	}
	maps.Copy(f.nodes, moved)
	return nil
}

// info implements [fs.FileInfo] and [fs.DirEntry].
type info struct {
	name string
	size int64
	node node
}

func (i info) Name() string               { return i.name }
func (i info) Size() int64                { return i.size }
func (i info) Mode() fs.FileMode          { return i.node.Mode }
func (i info) ModTime() time.Time         { return i.node.ModTime }
func (i info) IsDir() bool                { return i.node.Mode.IsDir() }
func (i info) Sys() any                   { return nil }
func (i info) Type() fs.FileMode          { return i.node.Mode.Type() }
func (i info) Info() (fs.FileInfo, error) { return i, nil }

// openFile is a file that a program has open.
type openFile struct {
	files *files
	name  string
	at    int64
	add   bool
}

func (o *openFile) Read(p []byte) (n int, err error) {
	changeErr := o.files.change(o.name, func(file *node) {
		if o.at >= int64(len(file.Data)) {
			err = io.EOF
			return
		}
		n = copy(p, file.Data[o.at:])
		o.at += int64(n)
	})
	if changeErr != nil {
		err = io.EOF // it was removed
	}
	return n, err
}

func (o *openFile) Write(p []byte) (int, error) {
	_ = o.files.change(o.name, func(file *node) {
		if o.add {
			o.at = int64(len(file.Data))
		}
		if missing := o.at + int64(len(p)) - int64(len(file.Data)); missing > 0 {
			file.Data = append(file.Data, make([]byte, missing)...)
		}
		copy(file.Data[o.at:], p)
		file.ModTime = time.Now()
		o.at += int64(len(p))
	}) // what is written to a file that was removed is lost
	return len(p), nil
}

func (o *openFile) Close() error { return nil }
