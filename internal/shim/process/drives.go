package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// drives gives the files of drives names that the VMM keeps for good. A VMM opens a
// drive again by its name when it is written to again after a pause; but files get other
// names, or their names get other files, when the VM is saved, or claimed. So the VMM
// knows each by a symbolic link of its own, which leads to where the file is.
type drives struct {
	dir   string
	count int
	links []string // of each drive, by its number
}

// link makes the name of the nth drive, whose file is at path.
func (d *drives) link(n int, path string) (string, error) {
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return "", err
	}
	d.count++
	name := filepath.Join(d.dir, fmt.Sprintf("drive%d", d.count))
	if err := os.Symlink(path, name); err != nil {
		return "", err
	}
	for len(d.links) <= n {
		d.links = append(d.links, "")
	}
	d.links[n] = name
	return name, nil
}

// move makes a link lead to where its file is now.
func (d *drives) move(link, path string) error {
	temp := link + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(path, temp); err != nil {
		return err
	}
	return os.Rename(temp, link)
}

// remove removes the links; the VMM has ended.
func (d *drives) remove() { _ = os.RemoveAll(d.dir) }
