package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// qcow2 returns a disk of this format with something changed in its header.
func qcow2(change func(header []byte)) []byte {
	image := emptyOverlay("", "", 1<<20)
	binary.BigEndian.PutUint64(image[8:], 0) // based on nothing
	if change != nil {
		change(image)
	}
	return image
}

// Only what is declared decides what a disk is, and what leads a VMM to other files is
// refused (S1).
func TestDeclare(t *testing.T) {
	be := binary.BigEndian
	feature := func(bit int) []byte {
		return qcow2(func(h []byte) { be.PutUint64(h[72:], 1<<bit) })
	}
	for name, test := range map[string]struct {
		content []byte
		format  string
		want    string // format, or error
	}{
		"nothing declared":        {marked(0x438, "\x53\xef"), "", Raw},
		"raw":                     {marked(0x438, "\x53\xef"), Raw, Raw},
		"ext4 that begins so":     {append([]byte(qcow2Magic), marked(0x438, "\x53\xef")[4:]...), "", ErrUndeclared.Error()},
		"qcow2, nothing declared": {qcow2(nil), "", ErrUndeclared.Error()},
		"qcow2 as raw":            {qcow2(nil), Raw, Raw},
		"qcow2":                   {qcow2(nil), QCOW2, QCOW2},
		"raw as qcow2":            {marked(0x438, "\x53\xef"), QCOW2, "is no qcow2 disk"},
		"nothing as qcow2":        {nil, QCOW2, "is no qcow2 disk"},
		"another format":          {nil, "vmdk", `format "vmdk" is not known`},
		"a base":                  {emptyOverlay("/etc/shadow", Raw, 1<<20), QCOW2, `is based on another file ("/etc/shadow")`},
		"a base without a name":   {qcow2(func(h []byte) { be.PutUint64(h[8:], 200) }), QCOW2, "is based on another file"},
		"a data file":             {feature(2), QCOW2, "keeps its data in another file"},
		"was not closed":          {feature(0), QCOW2, QCOW2},
		"corrupt":                 {feature(1), QCOW2, "is marked as corrupt"},
		"other compression":       {feature(3), QCOW2, QCOW2},
		"subclusters":             {feature(4), QCOW2, QCOW2},
		"a feature to come":       {feature(5), QCOW2, "features that are not known (0x20)"},
		"encrypted":               {qcow2(func(h []byte) { be.PutUint32(h[32:], 2) }), QCOW2, "is encrypted"},
		"snapshots":               {qcow2(func(h []byte) { be.PutUint32(h[60:], 1) }), QCOW2, "has snapshots in it"},
	} {
		t.Run(name, func(t *testing.T) {
			info, err := Declare(write(t, "d", test.content), test.format)
			switch {
			case err == nil || errors.Is(err, ErrNoFileSystem):
				if info.Format != test.want {
					t.Errorf("it is taken for %q (%v), want %q", info.Format, err, test.want)
				}
			case !strings.Contains(err.Error(), test.want):
				t.Errorf("error is %v, want %q", err, test.want)
			}
		})
	}
}

// A chain is what is declared, whatever its headers say; none of its files is forgotten, and
// none comes twice.
func TestDeclareChain(t *testing.T) {
	needQEMUImg(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	create := func(name string, args ...string) {
		run(t, "qemu-img", append([]string{"create", "-q", "-f", QCOW2, at(name), "1M"}, args...)...)
	}
	if err := os.WriteFile(at("base"), marked(0x438, "\x53\xef"), 0o600); err != nil {
		t.Fatal(err)
	}
	create("middle", "-b", at("base"), "-F", Raw)
	create("top", "-b", at("middle"), "-F", QCOW2)
	create("alone")
	create("hostile", "-u", "-b", "/etc/shadow", "-F", Raw)
	create("data file", "-o", "data_file="+at("data")+",data_file_raw=on")
	create("data file and base", "-u", "-b", "/etc/shadow", "-F", Raw, "-o", "data_file="+at("data2"))
	create("self")
	run(t, "qemu-img", "rebase", "-u", "-f", QCOW2, "-b", at("self"), "-F", QCOW2, at("self"))
	create("ring", "-u", "-b", at("self"), "-F", QCOW2)
	if err := errors.Join(os.Symlink("self", at("link")), os.Link(at("self"), at("hard link"))); err != nil {
		t.Fatal(err)
	}
	file := func(name, format string) File { return File{Path: at(name), Format: format} }
	long := make([]File, MaxChain+1)
	for n := range long {
		name := fmt.Sprintf("long%d", n)
		create(name, "-u", "-b", at(fmt.Sprintf("long%d", n+1)), "-F", QCOW2)
		long[n] = file(name, QCOW2)
	}
	for name, test := range map[string]struct {
		top   File
		below []File
		want  string // part of an error; empty: none
	}{
		"all named":                {file("top", QCOW2), []File{file("middle", QCOW2), file("base", Raw)}, ""},
		"one":                      {file("middle", QCOW2), []File{file("base", Raw)}, ""},
		"none, and none named":     {file("alone", QCOW2), nil, ""},
		"none named":               {file("top", QCOW2), nil, "middle\"), which was not named"},
		"the last is not named":    {file("top", QCOW2), []File{file("middle", QCOW2)}, "base\"), which was not named"},
		"named, but has none":      {file("alone", QCOW2), []File{file("base", Raw)}, "is not based on another file"},
		"one too many":             {file("middle", QCOW2), []File{file("base", Raw), file("alone", QCOW2)}, "is raw, and so not based"},
		"qcow2 without its format": {file("top", QCOW2), []File{file("middle", ""), file("base", Raw)}, "its format must be named"},
		"qcow2 as raw":             {file("top", QCOW2), []File{file("middle", Raw)}, ""},
		"raw as qcow2":             {file("top", QCOW2), []File{file("base", QCOW2)}, "is no qcow2 disk"},
		"missing":                  {file("middle", QCOW2), []File{file("gone", Raw)}, "no such file"},
		"/etc/shadow":              {file("hostile", QCOW2), nil, `is based on another file ("/etc/shadow")`},
		"/etc/shadow below":        {file("top", QCOW2), []File{file("hostile", QCOW2)}, `is based on another file ("/etc/shadow")`},
		"/etc/shadow replaced":     {file("hostile", QCOW2), []File{file("base", Raw)}, ""},
		"a data file":              {file("data file", QCOW2), nil, "keeps its data in another file"},
		"a data file below":        {file("top", QCOW2), []File{file("data file", QCOW2)}, "keeps its data in another file"},
		"a data file and a base":   {file("data file and base", QCOW2), []File{file("base", Raw)}, "keeps its data in another file"},
		"itself":                   {file("self", QCOW2), []File{file("self", QCOW2), file("base", Raw)}, "is based on itself"},
		"itself by a link":         {file("ring", QCOW2), []File{file("self", QCOW2), file("link", QCOW2), file("base", Raw)}, "is based on itself"},
		"itself by a hard link":    {file("self", QCOW2), []File{file("hard link", Raw)}, "is based on itself"},
		"itself without end":       {file("self", QCOW2), []File{file("self", QCOW2)}, "which was not named"},
		"the longest":              {file("long0", QCOW2), append(append([]File{}, long[1:MaxChain]...), file("base", Raw)), ""},
		"too long":                 {file("top", QCOW2), long, "at most 32 are allowed"},
	} {
		t.Run(name, func(t *testing.T) {
			info, chain, err := DeclareChain(test.top, test.below)
			if errors.Is(err, ErrNoFileSystem) {
				err = nil
			}
			switch {
			case test.want == "" && (err != nil || info.Format != QCOW2 || len(chain) != len(test.below)):
				t.Errorf("DeclareChain = %+v, %v, %v", info, chain, err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("error is %v, want %q", err, test.want)
			}
			for n, file := range chain {
				if file != test.below[n] {
					t.Errorf("file %d is %+v, want %+v", n, file, test.below[n])
				}
			}
		})
	}
}
