package distro

import (
	"archive/tar"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/smolvm/smolvm/internal/image/deb"
)

// adminDir is where dpkg keeps its database.
const adminDir = "/var/lib/dpkg"

// instance returns the name by which dpkg's database has a package: with its architecture if
// it can be there for several.
func (i *installed) instance() string {
	if i.Control.SameInstance() {
		return i.name() + ":" + i.Control.Get("Architecture")
	}
	return i.name()
}

// writeDatabase writes dpkg's database, in which all packages are unpacked and none is
// configured. See deb-triggers(5) and the "info" formats in dpkg's doc/spec.
func (l *layer) writeDatabase() error {
	for _, dir := range []string{"", "/alternatives", "/info", "/parts", "/triggers", "/updates"} {
		if err := l.makeDir(adminDir + dir); err != nil {
			return err
		}
	}
	files := map[string]string{
		"/info/format": "1\n", "/available": "", "/diversions": "", "/statoverride": "", "/lock": "", "/lock-frontend": "",
		"/triggers/Lock": "", "/triggers/Unincorp": "",
	}
	maps.Copy(files, l.triggers())
	var status strings.Builder
	for _, p := range l.packages {
		status.WriteString(p.status().String() + "\n")
		for _, name := range slices.Sorted(maps.Keys(p.Info)) {
			if err := l.writeFile(adminDir+"/info/"+p.instance()+"."+name, infoMode(name), p.Info[name]); err != nil {
				return err
			}
		}
		files["/info/"+p.instance()+".list"] = p.list()
		if p.sums != nil {
			files["/info/"+p.instance()+".md5sums"] = p.sums.String()
		}
	}
	files["/status"] = status.String()
	for _, name := range slices.Sorted(maps.Keys(files)) {
		mode := int64(0o644)
		if strings.HasPrefix(name, "/lock") || name == "/triggers/Lock" {
			mode = 0o600
		}
		if err := l.writeFile(adminDir+name, mode, []byte(files[name])); err != nil {
			return err
		}
	}
	return nil
}

// makeDir makes a directory of root's unless a package has it.
func (l *layer) makeDir(name string) error {
	name = strings.TrimPrefix(name, "/")
	if _, ok := l.entries[name]; ok {
		return nil
	}
	l.entries[name] = entry{kind: dirKind}
	return l.out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755})
}

// infoMode returns the mode of a file of a control archive: scripts can be run.
func infoMode(name string) int64 {
	switch name {
	case "preinst", "postinst", "prerm", "postrm", "config":
		return 0o755
	}
	return 0o644
}

// status returns a package's paragraph of the database.
func (i *installed) status() deb.Paragraph {
	paragraph := deb.Paragraph{{Name: "Package", Value: i.name()}, {Name: "Status", Value: "install ok unpacked"}}
	for _, field := range i.Control {
		if !strings.EqualFold(field.Name, "Package") {
			paragraph = append(paragraph, field)
		}
	}
	var conffiles strings.Builder
	for _, name := range slices.Sorted(maps.Keys(i.conffiles)) {
		if sum := i.conffiles[name]; sum != "" {
			fmt.Fprintf(&conffiles, "\n %s %s", name, sum)
		}
	}
	if conffiles.Len() > 0 {
		paragraph = append(paragraph, deb.Field{Name: "Conffiles", Value: conffiles.String()})
	}
	return paragraph
}

// list returns the paths of a package as dpkg keeps them. What was left out is in it, as it is
// when dpkg leaves it out.
func (i *installed) list() string {
	var list strings.Builder
	for _, name := range i.paths {
		if !i.gone[inMergedUsr(name)] {
			list.WriteString("/" + name + "\n")
		}
	}
	return list.String()
}

// triggers returns the files by which dpkg knows who is interested in which trigger, by their
// name below its directory.
func (l *layer) triggers() map[string]string {
	files := map[string]string{}
	for _, p := range l.packages {
		for line := range strings.Lines(string(p.Info["triggers"])) {
			line, _, _ = strings.Cut(line, "#")
			words := strings.Fields(line)
			if len(words) != 2 || !strings.HasPrefix(words[0], "interest") {
				continue
			}
			suffix := ""
			if words[0] == "interest-noawait" {
				suffix = "/noawait"
			}
			trigger := words[1]
			switch {
			case strings.HasPrefix(trigger, "/"):
				files["/triggers/File"] += trigger + " " + p.instance() + suffix + "\n"
			case isTrigger(trigger):
				files["/triggers/"+trigger] += p.instance() + suffix + "\n"
			}
		}
	}
	return files
}

// isTrigger reports whether a trigger may have that name, which becomes the name of a file. Those
// with capitals are dpkg's own.
func isTrigger(name string) bool {
	return deb.IsName(name) || len(name) == 1 && 'a' <= name[0] && name[0] <= 'z'
}

// leftOut reports whether a file is left out of images, given its path: what most images of
// containers leave out too, as their users don't read it there. Licences stay, and so do
// directories, as some maintainer scripts make links in them.
func leftOut(path string) bool {
	rest, ok := strings.CutPrefix(path, "/usr/share/")
	if !ok {
		return false
	}
	top, inside, _ := strings.Cut(rest, "/")
	switch top {
	case "doc":
		return !strings.HasSuffix(inside, "/copyright")
	case "locale":
		return inside != "locale.alias"
	case "groff", "info", "linda", "man":
		return true
	case "lintian":
		return strings.HasPrefix(inside, "overrides/")
	}
	return false
}

// dpkgConfig has dpkg in a guest do as [leftOut]. It need not sync each file: a machine whose
// power fails while it installs packages is thrown away.
const dpkgConfig = `# What smolvm leaves out of images, and what it has dpkg leave out too.
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/groff/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/linda/*
path-exclude=/usr/share/lintian/overrides/*
path-exclude=/usr/share/locale/*
path-include=/usr/share/locale/locale.alias
path-exclude=/usr/share/man/*
path-include=/usr/share/man/man[1-9]
force-unsafe-io
`
