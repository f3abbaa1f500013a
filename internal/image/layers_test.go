package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/ocitar"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// member is an entry of a layer.
type member struct {
	tar.Header
	content string
}

func file(name, content string) member {
	return member{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, content}
}

func dir(name string) member {
	return member{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, ""}
}

func link(kind byte, name, to string) member {
	return member{tar.Header{Typeflag: kind, Name: name, Linkname: to, Mode: 0o644}, ""}
}

// layer is a layer's archive.
type layer []byte

func layerOf(t testing.TB, members ...member) layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		m.Size = int64(len(m.content))
		m.Format = tar.FormatPAX
		if m.ModTime.IsZero() {
			m.ModTime = time.Unix(1_700_000_000, 0)
		}
		must(t, w.WriteHeader(&m.Header))
		_, err := io.WriteString(w, m.content)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// packing packs a layer, or not.
type packing func(t testing.TB, l layer) []byte

func plain(_ testing.TB, l layer) []byte { return l }

func byGzip(t testing.TB, l layer) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(l)
	must(t, err, w.Close())
	return b.Bytes()
}

func byZstd(t testing.TB, l layer) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	must(t, err)
	return w.EncodeAll(l, nil)
}

func (l layer) diffID() string { return fmt.Sprintf("sha256:%x", sha256.Sum256(l)) }

func packed(t testing.TB, how packing, layers ...layer) []ocilayer.Layer {
	t.Helper()
	var all []ocilayer.Layer
	for _, l := range layers {
		content := how(t, l)
		all = append(all, ocilayer.Layer{DiffID: l.diffID(), Open: func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(content)), nil
		}})
	}
	return all
}

// containerd builds the program that applies layers as containerd does.
func containerd(t testing.TB) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can unpack layers to files of their owners, and mount what is compared with them")
	}
	path := filepath.Join(t.TempDir(), "containerd")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", path, ".")
	build.Dir = filepath.Join("testdata", "containerd")
	if out, err := build.CombinedOutput(); err != nil {
		if strings.Contains(string(out), "dial tcp") || strings.Contains(string(out), "module lookup disabled") {
			t.Skipf("containerd's unpacker can't be fetched: %s", out)
		}
		t.Fatalf("build containerd's unpacker: %v\n%s", err, out)
	}
	return path
}

// applied applies layers by containerd. It returns the directory, and containerd's error.
func applied(t testing.TB, program string, layers ...layer) (string, error) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "tree")
	must(t, os.Mkdir(out, 0o755))
	args := []string{out}
	for i, l := range layers {
		path := filepath.Join(filepath.Dir(out), fmt.Sprintf("%d.tar", i))
		must(t, os.WriteFile(path, l, 0o600))
		args = append(args, path)
	}
	if said, err := exec.CommandContext(t.Context(), program, args...).CombinedOutput(); err != nil {
		return out, fmt.Errorf("%w: %s", err, said)
	}
	return out, nil
}

// written writes a root file system of layers, and returns its path.
func written(t testing.TB, layers []ocilayer.Layer, opts LayerOptions) (string, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rootfs")
	return path, WriteLayers(t.Context(), path, layers, opts)
}

// mounted mounts a root file system, and returns where.
func mounted(t testing.TB, path string) string {
	t.Helper()
	at := filepath.Join(t.TempDir(), "mnt")
	must(t, os.Mkdir(at, 0o755))
	if out, err := exec.CommandContext(t.Context(), "mount", "-o", "loop,ro,noload", path, at).CombinedOutput(); err != nil {
		t.Skipf("nothing can be mounted here: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	return at
}

// checkFS fails unless e2fsck finds nothing.
func checkFS(t testing.TB, path string) {
	t.Helper()
	tool, err := findTool("e2fsck")
	must(t, err)
	if out, err := exec.CommandContext(t.Context(), tool, "-f", "-n", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

// listing tells all of a tree that an image can rely on, by path. Those are not the times of
// directories, which in containerd's tree are the unpacking's if a later layer changes them.
func listing(t testing.TB, root string) map[string]string {
	t.Helper()
	found := map[string]string{}
	inodes := map[uint64]string{}
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		var stat unix.Stat_t
		must(t, unix.Lstat(path, &stat))
		name, err := filepath.Rel(root, path)
		must(t, err)
		if name == "lost+found" {
			return filepath.SkipDir
		}
		text := fmt.Sprintf("mode %o owner %d:%d", stat.Mode, stat.Uid, stat.Gid)
		if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
			first, ok := inodes[stat.Ino]
			if !ok {
				inodes[stat.Ino], first = name, name
			}
			text += fmt.Sprintf(" links %d, as %q, at %d", stat.Nlink, first, stat.Mtim.Sec)
		}
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			must(t, err)
			text += fmt.Sprintf(" size %d %x", stat.Size, sha256.Sum256(content))
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			must(t, err)
			text += fmt.Sprintf(" to %q", target)
		case unix.S_IFCHR, unix.S_IFBLK:
			text += fmt.Sprintf(" device %d:%d", unix.Major(stat.Rdev), unix.Minor(stat.Rdev))
		}
		found[name] = text + attributes(t, path)
		return nil
	}))
	return found
}

func attributes(t testing.TB, path string) string {
	t.Helper()
	names := make([]byte, 4096)
	n, err := unix.Llistxattr(path, names)
	must(t, err)
	var all []string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if name == "" || name == "security.selinux" {
			continue
		}
		value := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, value)
		must(t, err)
		all = append(all, fmt.Sprintf(" %s=%x", name, value[:n]))
	}
	slices.Sort(all)
	return strings.Join(all, "")
}

// compare fails unless layers make what containerd makes of them, or both refuse them.
func compare(t *testing.T, program string, how packing, layers ...layer) {
	t.Helper()
	tree, refused := applied(t, program, layers...)
	path, err := written(t, packed(t, how, layers...), LayerOptions{})
	if refused != nil || err != nil {
		if refused == nil || err == nil && !inTheEnd(refused) {
			t.Errorf("containerd: %v; here: %v", refused, err)
		}
		return
	}
	checkFS(t, path)
	got, want := listing(t, mounted(t, path)), listing(t, tree)
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if got[name] != want[name] {
			t.Errorf("%q is %q, want %q", name, got[name], want[name])
		}
	}
	for name, text := range got {
		if want[name] == "" {
			t.Errorf("%q is %q, want nothing", name, text)
		}
	}
}

// inTheEnd reports whether containerd has failed when all was unpacked: it sets the times of
// directories then, by their names, which may have another meaning by then, or none.
func inTheEnd(err error) bool {
	return slices.ContainsFunc([]string{"UtimesNanoAt", "too many links", "lstat"}, func(text string) bool { return strings.Contains(err.Error(), text) })
}

// with returns a member with another header.
func with(m member, change func(h *tar.Header)) member {
	change(&m.Header)
	return m
}

func TestWriteLayersAsContainerd(t *testing.T) {
	program := containerd(t)
	long := strings.Repeat("n", 255)
	base := layerOf(t, dir("./"), dir("etc/"), file("etc/passwd", "root"), dir("a/"), dir("a/b/"), file("a/b/c", "c"), file("a/d", "d"),
		link(tar.TypeSymlink, "s", "a"), link(tar.TypeSymlink, "abs", "/a/b"), link(tar.TypeSymlink, "up", "../../../a"), link(tar.TypeSymlink, "out", "/etc/passwd"),
		link(tar.TypeSymlink, "dangling", "none/such"), link(tar.TypeSymlink, "loop", "loop"), link(tar.TypeLink, "a/hard", "a/d"))
	for name, layers := range map[string][]layer{
		"kinds": {layerOf(t, dir("d"), file("d/empty", ""), file("d/large", strings.Repeat("large", 300_000)), file("d/holes", strings.Repeat("\x00", 200_000)+"x"+strings.Repeat("\x00", 9000)),
			with(file("setuid", "x"), func(h *tar.Header) { h.Mode = 0o6755; h.Uid = 70_000; h.Gid = 4_000_000_000 }),
			with(dir("sticky"), func(h *tar.Header) { h.Mode = 0o1777 }), link(tar.TypeFifo, "fifo", ""),
			with(link(tar.TypeChar, "null", ""), func(h *tar.Header) { h.Devmajor, h.Devminor = 1, 3 }),
			with(link(tar.TypeBlock, "disk", ""), func(h *tar.Header) { h.Devmajor, h.Devminor = 259, 70_000 }),
			link(tar.TypeSymlink, "short", strings.Repeat("x", 59)), link(tar.TypeSymlink, "longer", strings.Repeat("x/", 1000)),
			with(file("capable", "x"), func(h *tar.Header) {
				h.PAXRecords = map[string]string{ocitar.XattrRecord + "security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
					ocitar.XattrRecord + "user.word": "value", ocitar.XattrRecord + "user.long": strings.Repeat("long", 200), ocitar.XattrRecord + "trusted.overlay.opaque": "y"}
			}),
			with(link(tar.TypeSymlink, "linkattr", "x"), func(h *tar.Header) { h.PAXRecords = map[string]string{ocitar.XattrRecord + "user.word": "v"} }))},
		"names":                      {layerOf(t, file(long, "x"), file("new\nline \"quoted\" \\ \xff\xfe \x1b[31m", "x"), file(strings.Repeat("deep/", 200)+"x", "x"), file("ünïcödé", "x"), file(" ", "x"))},
		"times":                      {layerOf(t, with(file("old", ""), func(h *tar.Header) { h.ModTime = time.Unix(-5, 0) }), with(file("far", ""), func(h *tar.Header) { h.ModTime = time.Unix(1<<35, 0) }), with(file("2100", ""), func(h *tar.Header) { h.ModTime = time.Unix(4102444800, 0) }))},
		"replaced":                   {base, layerOf(t, file("etc/passwd", "other"), file("a/b", "now a file"), dir("s"), file("s/in", "x"), link(tar.TypeSymlink, "a/d", "b"), with(dir("etc"), func(h *tar.Header) { h.Mode = 0o700; h.Uid = 5 }))},
		"removed":                    {base, layerOf(t, file("a/.wh.b", ""), file(".wh.none", ""), file(".wh.abs", ""), file("etc/.wh.passwd", ""))},
		"removed, made again":        {base, layerOf(t, file(".wh.a", ""), file("a/new", "x"))},
		"made, then removed":         {base, layerOf(t, file("a/new", "x"), file(".wh.a", ""))},
		"removed in a new directory": {base, layerOf(t, file("n/e/w/.wh.x", ""))},
		"opaque first":               {base, layerOf(t, dir("a"), file("a/.wh..wh..opq", ""), file("a/new", "x"))},
		"opaque last":                {base, layerOf(t, dir("a"), file("a/new", "x"), dir("a/b"), file("a/b/new", "x"), file("a/e/f", "x"), file("a/.wh..wh..opq", ""))},
		"opaque with links":          {base, layerOf(t, link(tar.TypeLink, "a/more", "a/d"), file("a/.wh..wh..opq", ""))},
		"opaque root":                {base, layerOf(t, file("new", "x"), file(".wh..wh..opq", ""))},
		"opaque twice":               {base, layerOf(t, dir("a"), file("a/.wh..wh..opq", ""), file("a/.wh..wh..opq", ""))},
		"opaque nowhere":             {base, layerOf(t, file("none/.wh..wh..opq", ""))},
		"hides nothing":              {base, layerOf(t, file("a/.wh.", ""))},
		"hides dot":                  {base, layerOf(t, file("a/.wh..", ""))},
		"hides dot dot":              {base, layerOf(t, file("a/.wh...", ""))},
		"through links":              {base, layerOf(t, file("s/one", "1"), file("abs/two", "2"), file("up/three", "3"), file("s/../four", "4"))},
		"through a dangling link":    {base, layerOf(t, file("dangling/x", "x"))},
		"through a link out":         {base, layerOf(t, file("out/x", "x"))},
		"through a loop":             {base, layerOf(t, file("loop/x", "x"))},
		"through a file":             {base, layerOf(t, file("a/d/x", "x"))},
		"above the root":             {base, layerOf(t, file("../../one", "1"), file("/two", "2"), file("a/../../three", "3"), dir(".."), dir("../.."), dir("/"), dir("."))},
		"link over directory":        {base, layerOf(t, link(tar.TypeSymlink, "a", "/etc"), file("a/new", "x"))},
		"hard links":                 {base, layerOf(t, link(tar.TypeLink, "one", "/a/d"), link(tar.TypeLink, "two", "s/d"), link(tar.TypeLink, "three", "../out"), with(link(tar.TypeLink, "four", "a/b/c"), func(h *tar.Header) { h.Uid = 7; h.Mode = 0o600 }))},
		"hard link to nothing":       {base, layerOf(t, link(tar.TypeLink, "one", "none"))},
		"hard link to itself":        {base, layerOf(t, link(tar.TypeLink, "a/d", "a/d"))},
		"hard link to a directory":   {base, layerOf(t, link(tar.TypeLink, "one", "a"))},
		"hard link, then other":      {base, layerOf(t, file("a/d", "other")), layerOf(t, file(".wh.a", ""))},
		"one file twice":             {layerOf(t, file("x", "first"), file("x", "second"), dir("x"), file("x/y", ""), file("x", "third"))},
		"child before parent":        {layerOf(t, file("p/q/r", "x"), with(dir("p/q"), func(h *tar.Header) { h.Mode = 0o711 }), with(dir("p"), func(h *tar.Header) { h.Uid = 3 }))},
		"link to nowhere":            {layerOf(t, link(tar.TypeSymlink, "x", ""))},
		"unknown kind":               {layerOf(t, link('7', "x", ""))},
		"no entries":                 {layerOf(t), base, layerOf(t)},
		"aufs":                       {layerOf(t, file(".wh..wh.aufs", ""), dir(".wh..wh.plnk"), file(".wh..wh.orph/x", "x"))},
	} {
		t.Run(name, func(t *testing.T) {
			compare(t, program, plain, layers...)
		})
	}
	for name, how := range map[string]packing{"gzip": byGzip, "zstd": byZstd} {
		t.Run(name, func(t *testing.T) {
			compare(t, program, how, base, layerOf(t, file("a/more", strings.Repeat("more", 100_000))))
		})
	}
}

// randomLayer returns a layer of few names, so that entries meet.
func randomLayer(t testing.TB, r *rand.Rand) layer {
	t.Helper()
	pick := func(from ...string) string { return from[r.IntN(len(from))] }
	name := func() string {
		text := pick("a", "b", "c")
		for range r.IntN(3) {
			text += "/" + pick("a", "b", "c", "d", "..")
		}
		return text
	}
	members := []member{}
	modified := time.Unix(1_700_000_000+r.Int64N(1000), 0) // one for all: in the end containerd sets those of directories by name
	for range 1 + r.IntN(12) {
		var m member
		switch r.IntN(12) {
		case 0, 1, 2:
			m = dir(name())
		case 3, 4, 5:
			m = file(name(), strings.Repeat(pick("x", "y", "\x00"), r.IntN(10_000)))
		case 6, 7:
			m = link(tar.TypeSymlink, name(), pick("a", "/b", "../c", "b/../a", "/a/b/..", "..", ".", "/", "../../../b/c", "d"))
		case 8:
			m = link(tar.TypeLink, name(), pick("", "/", "../")+name())
		case 9:
			m = file(filepath.Join(name(), ".wh."+pick("a", "b", "c")), "")
		case 10:
			m = file(filepath.Join(name(), ".wh..wh..opq"), "")
		default:
			m = with(link(tar.TypeChar, name(), ""), func(h *tar.Header) { h.Devmajor = 1; h.Devminor = r.Int64N(300) })
		}
		m.Mode, m.Uid, m.Gid = int64(0o600|r.IntN(0o10000)), r.IntN(3), r.IntN(100_000)
		m.ModTime = modified
		members = append(members, m)
	}
	return layerOf(t, members...)
}

// Whatever layers say, they make what containerd makes of them.
func TestWriteLayersAtRandom(t *testing.T) {
	program := containerd(t)
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 11))
		var layers []layer
		for range 1 + r.IntN(4) {
			next := randomLayer(t, r)
			if _, err := applied(t, program, append(slices.Clone(layers), next)...); err != nil && r.IntN(4) > 0 {
				continue // mostly without those that are refused
			}
			layers = append(layers, next)
		}
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) { compare(t, program, plain, layers...) }) {
			for i, l := range layers {
				archive := tar.NewReader(bytes.NewReader(l))
				for h, err := archive.Next(); err == nil; h, err = archive.Next() {
					t.Logf("layer %d: %q %c -> %q", i, h.Name, h.Typeflag, h.Linkname)
				}
			}
		}
	}
}

// Hostile layers are refused, with the entry's name, and leave no file.
func TestWriteLayersRefuses(t *testing.T) {
	many := func(count int) layer {
		var members []member
		for i := range count {
			members = append(members, file(fmt.Sprint(i), ""))
		}
		return layerOf(t, members...)
	}
	deep := func() []layer { // directories in each other, beyond what one path can name
		var layers []layer
		for range 20 {
			path := strings.Repeat("d/", 150)
			layers = append(layers, layerOf(t, dir("s/"+path), file("s/"+path+"x", ""), link(tar.TypeSymlink, "t", "s/"+path), file(".wh.s", "")))
		}
		return layers
	}
	nested := func() layer { // each directory is made through a link to the one before
		var members []member
		members = append(members, dir("0"), link(tar.TypeSymlink, "l", "0"))
		path := "0"
		for range 30 {
			next := strings.Repeat("d/", 100)
			path += "/" + strings.TrimSuffix(next, "/")
			members = append(members, dir("l/"+next), link(tar.TypeSymlink, "m", "l/"+next), link(tar.TypeSymlink, "l", "/"+path))
		}
		return layerOf(t, members...)
	}
	cut := layerOf(t, file("x", strings.Repeat("x", 10_000)))
	header := func(change func(h *tar.Header)) []layer {
		return []layer{layerOf(t, with(file("x", ""), change))}
	}
	for _, test := range []struct {
		name   string
		layers []layer
		limits ocilayer.Limits
		want   string
	}{
		{"many entries", []layer{many(60), many(50)}, ocilayer.Limits{Entries: 100}, "layer 2 of 2"},
		{"many bytes", []layer{layerOf(t, file("x", strings.Repeat("x", 100_000)))}, ocilayer.Limits{Bytes: 50_000}, "more than an image may have"},
		{"bytes behind the end", []layer{append(layerOf(t), make([]byte, 100_000)...)}, ocilayer.Limits{Bytes: 50_000}, "more than an image may have"},
		{"cut", []layer{cut[:5000]}, ocilayer.Limits{}, "EOF"},
		{"no archive", []layer{layer(strings.Repeat("text ", 1000))}, ocilayer.Limits{}, "layer 1 of 1"},
		{"deep through links", []layer{nested()}, ocilayer.Limits{}, "in each other"},
		{"long name", []layer{layerOf(t, file(strings.Repeat("n", 256), ""))}, ocilayer.Limits{}, "longer"},
		{"long path", []layer{layerOf(t, file(strings.Repeat("n/", 2500)+"x", ""))}, ocilayer.Limits{}, "longer"},
		{"long link", []layer{layerOf(t, link(tar.TypeSymlink, "x", strings.Repeat("n", 4096)))}, ocilayer.Limits{}, "longer"},
		{"owner below zero", header(func(h *tar.Header) { h.Uid = -1 }), ocilayer.Limits{}, "owner"},
		{"owner that means none", header(func(h *tar.Header) { h.Gid = 1<<32 - 1 }), ocilayer.Limits{}, "owner"},
		{"device that Linux has not", header(func(h *tar.Header) { h.Typeflag, h.Devmajor = tar.TypeChar, 5000 }), ocilayer.Limits{}, "device"},
		{"lost+found is a file", []layer{layerOf(t, file("lost+found", ""))}, ocilayer.Limits{}, "lost+found"},
		{"large attribute", header(func(h *tar.Header) {
			h.PAXRecords = map[string]string{ocitar.XattrRecord + "user.x": strings.Repeat("x", 5000)}
		}), ocilayer.Limits{}, "attributes"},
		{"long attribute's name", header(func(h *tar.Header) {
			h.PAXRecords = map[string]string{ocitar.XattrRecord + "user." + strings.Repeat("x", 256): "x"}
		}), ocilayer.Limits{}, "attributes"},
		{"many names of one file", func() []layer {
			members := []member{file("x", "")}
			for i := range 65_001 {
				members = append(members, link(tar.TypeLink, fmt.Sprint(i), "x"))
			}
			return []layer{layerOf(t, members...)}
		}(), ocilayer.Limits{}, "names"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path, err := written(t, packed(t, plain, test.layers...), LayerOptions{Limits: test.limits})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("there is a file left (%v)", err)
			}
		})
	}
	path, err := written(t, packed(t, plain, deep()...), LayerOptions{})
	must(t, err)
	checkFS(t, path)
}

// A layer that is not what the configuration says is refused.
func TestWriteLayersOther(t *testing.T) {
	layers := packed(t, byGzip, layerOf(t, file("x", "")), layerOf(t, file("y", "")))
	layers[1].DiffID = layers[0].DiffID
	_, err := written(t, layers, LayerOptions{})
	var other *ocilayer.DiffIDError
	if !errors.As(err, &other) || other.Layer != 1 {
		t.Errorf("another layer: %v", err)
	}
}

// What later layers hide takes no room, and zeros are holes.
func TestWriteLayersIsLean(t *testing.T) {
	content := make([]byte, 30<<20)
	_, err := rand.NewChaCha8([32]byte{}).Read(content)
	must(t, err)
	large := layerOf(t, file("a/large", string(content)), file("zeros", strings.Repeat("\x00", 50<<20)))
	taken := func(layers ...layer) int64 {
		path, err := written(t, packed(t, plain, layers...), LayerOptions{})
		must(t, err)
		checkFS(t, path)
		return usage(path)
	}
	with, without := taken(large), taken(large, layerOf(t, file(".wh.a", "")))
	if with > 50<<20 {
		t.Errorf("30 MiB and zeros take %d MiB", with>>20)
	}
	if without > with-28<<20 {
		t.Errorf("with 30 MiB that are hidden it takes %d MiB, and %d MiB without them hidden", without>>20, with>>20)
	}
}

// Layers that make more than a file system has room for get a larger one.
func TestWriteLayersGrows(t *testing.T) {
	var many []member
	for i := range 9000 {
		many = append(many, file(fmt.Sprintf("%d/%d", i%100, i), ""))
	}
	for name, l := range map[string]layer{"many files": layerOf(t, many...), "large file": layerOf(t, file("x", strings.Repeat("x", 200<<20)))} {
		t.Run(name, func(t *testing.T) {
			made := ext4{path: filepath.Join(t.TempDir(), "rootfs"), size: 128 << 20, seed: strings.Repeat("0", 64)}
			must(t, writeGrowing(t.Context(), made, packed(t, plain, l), LayerOptions{}))
			checkFS(t, made.path)
			if info, err := os.Stat(made.path); err != nil || info.Size() != 512<<20 {
				t.Errorf("it has %d bytes (%v)", info.Size(), err)
			}
		})
	}
}
