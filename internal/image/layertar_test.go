package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/layertar"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/workspace"
)

// nastyTree makes a tree that has all that a layer may hold.
func nastyTree(t *testing.T, root string) {
	t.Helper()
	at := func(name string) string { return filepath.Join(root, name) }
	old := unix.NsecToTimespec(time.Unix(1_000_000_000, 0).UnixNano())
	must(t,
		os.MkdirAll(at("usr/bin"), 0o755), os.MkdirAll(at("d/e/f"), 0o700), os.Chmod(at("d"), 0o1777), os.Chmod(at("d/e"), 0o2750),
		os.WriteFile(at("usr/bin/su"), []byte("su"), 0o755), os.Chown(at("usr/bin/su"), 0, 42), os.Chmod(at("usr/bin/su"), 0o6755),
		os.WriteFile(at("usr/bin/ping"), []byte("ping"), 0o755), unix.Lsetxattr(at("usr/bin/ping"), "security.capability", capability(), 0),
		os.WriteFile(at("user"), nil, 0o600), os.Chown(at("user"), 100_000, 4_000_000_000), unix.Lsetxattr(at("user"), "user.binary", []byte("a\x00\xff="), 0),
		os.Link(at("user"), at("d/e/f/same")), os.Link(at("user"), at("a-third")),
		os.Symlink("/nowhere/at/all", at("dangling")), os.Symlink(strings.Repeat("x", 300), at("long-link")), os.Link(at("dangling"), at("dangling-too")),
		unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), unix.Mknod(at("disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(4000, 1_000_000))),
		unix.Mkfifo(at("fifo"), 0o640),
		os.WriteFile(at("\xff\xfe\n\\ \t*"), []byte("any bytes"), 0o644), os.WriteFile(at(strings.Repeat("ü", 127)), []byte("long"), 0o644),
		os.MkdirAll(at(strings.Repeat(strings.Repeat("deep", 30)+"/", 12)), 0o755),
		os.WriteFile(at("sparse"), []byte("begin"), 0o644), os.Truncate(at("sparse"), 10<<20),
	)
	// All the same time, so that it can be compared.
	must(t, filepath.Walk(root, func(path string, _ os.FileInfo, err error) error {
		must(t, err, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{old, old}, unix.AT_SYMLINK_NOFOLLOW))
		return nil
	}))
}

// capability is cap_net_raw=ep, as the kernel has it: version 2.
func capability() []byte {
	return append([]byte{1, 0, 0, 2, 0, 1 << 5, 0, 0}, make([]byte, 12)...)
}

func archiveOf(t *testing.T, dir string, opts layertar.Options) layer {
	t.Helper()
	var archive bytes.Buffer
	must(t, layertar.Write(t.Context(), &archive, dir, opts))
	must(t, ocilayer.Check(t.Context(), bytes.NewReader(archive.Bytes()), ocilayer.Limits{}))
	return archive.Bytes()
}

func equalTrees(t *testing.T, name string, got, want map[string]string) {
	t.Helper()
	for path := range want {
		if got[path] != want[path] {
			t.Errorf("%s: %.100q is %q, want %q", name, path, got[path], want[path])
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%s: there is %.100q", name, path)
		}
	}
}

// What a guest sends of a directory is, to containerd, to the agent and to us, the same tree.
func TestLayerOfDirectory(t *testing.T) {
	program := containerd(t)
	source := t.TempDir()
	nastyTree(t, source)
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(t, err, unix.Bind(socket, &unix.SockaddrUnix{Name: filepath.Join(source, "socket")}), unix.Close(socket))
	archive := archiveOf(t, source, layertar.Options{})
	want := listing(t, source)
	delete(want, "socket")

	applied, err := applied(t, program, archive)
	must(t, err)
	equalTrees(t, "containerd", listing(t, applied), want)

	path, err := written(t, packed(t, plain, archive), LayerOptions{})
	must(t, err)
	equalTrees(t, "root file system", listing(t, mounted(t, path)), want)

	extracted := filepath.Join(t.TempDir(), "extracted")
	must(t, os.Mkdir(extracted, 0o755), layertar.Extract(t.Context(), bytes.NewReader(archive), extracted))
	equalTrees(t, "extracted", listing(t, extracted), want)
	if again := archiveOf(t, extracted, layertar.Options{}); !bytes.Equal(again, archive) {
		t.Error("the archive of what was extracted is another one")
	}
}

// What a guest sends of the upper directory of an overlay makes of the lower one what the
// overlay shows.
func TestLayerOfOverlay(t *testing.T) {
	program := containerd(t)
	dir := t.TempDir()
	lower, merged := filepath.Join(dir, "l"), filepath.Join(dir, "m")
	must(t, os.Mkdir(dir+"/fs", 0o755), unix.Mount("tmpfs", dir+"/fs", "tmpfs", 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(dir+"/fs", unix.MNT_DETACH) })
	upper, work := dir+"/fs/u", dir+"/fs/w"
	must(t, os.Mkdir(lower, 0o755), os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755), os.Mkdir(merged, 0o755))
	nastyTree(t, lower)
	must(t, os.MkdirAll(lower+"/gone/with/all", 0o755), os.MkdirAll(lower+"/anew/old", 0o755), os.MkdirAll(lower+"/moved/in", 0o755))
	base := archiveOf(t, lower, layertar.Options{})
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,index=off,metacopy=off,redirect_dir=off", lower, upper, work)
	if err := unix.Mount("overlay", merged, "overlay", 0, data); err != nil {
		t.Skipf("no overlay can be mounted here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(merged, unix.MNT_DETACH) })
	at := func(name string) string { return filepath.Join(merged, name) }
	must(t,
		os.RemoveAll(at("gone")), os.Remove(at("usr/bin/su")), os.Remove(at("null")), os.Remove(at("disk")),
		os.RemoveAll(at("anew")), os.MkdirAll(at("anew/new"), 0o700),
		os.Remove(at("fifo")), os.Mkdir(at("fifo"), 0o755),
		os.RemoveAll(at("d")), os.WriteFile(at("d"), []byte("a file now"), 0o644),
		os.Chmod(at("usr/bin/ping"), 0o700), os.Chown(at("user"), 1, 2),
		unix.Removexattr(at("user"), "user.binary"), unix.Lsetxattr(at("a-third"), "user.other", []byte("x"), 0),
		os.WriteFile(at("usr/x"), []byte("x"), 0o644), os.Link(at("usr/x"), at("usr/y")),
	)
	must(t, filepath.Walk(merged, func(path string, _ os.FileInfo, err error) error {
		old := unix.NsecToTimespec(time.Unix(1_200_000_000, 0).UnixNano())
		must(t, err)
		if path == merged || strings.HasPrefix(path, at("usr")) || strings.HasPrefix(path, at("anew")) || path == at("d") || path == at("fifo") {
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{old, old}, unix.AT_SYMLINK_NOFOLLOW))
		}
		return nil
	}))
	want := listing(t, merged)
	change := archiveOf(t, upper, layertar.Options{Upper: true})
	tree, err := applied(t, program, base, change)
	must(t, err)
	equalTrees(t, "containerd", listing(t, tree), want)
	path, err := written(t, packed(t, plain, base, change), LayerOptions{})
	must(t, err)
	equalTrees(t, "root file system", listing(t, mounted(t, path)), want)
	extracted := t.TempDir()
	must(t, layertar.Extract(t.Context(), bytes.NewReader(base), extracted), layertar.Extract(t.Context(), bytes.NewReader(change), extracted))
	equalTrees(t, "extracted", listing(t, extracted), want)
}

// A file that no layer can hold, as its name would hide another there, is named.
func TestLayerWithoutWhiteoutsOfUsers(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, ".wh.x"), nil, 0o644))
	err := layertar.Write(t.Context(), io.Discard, dir, layertar.Options{})
	if err == nil || !strings.Contains(err.Error(), `"/.wh.x"`) {
		t.Errorf("got %v", err)
	}
}

// Links in a directory lead to places in it, whatever they say, or nowhere.
func TestExtractStaysInside(t *testing.T) {
	for name, test := range map[string]struct {
		header tar.Header
		made   string // below the directory; empty: there is an error
	}{
		"above the root":       {tar.Header{Typeflag: tar.TypeReg, Name: "../../above"}, "above"},
		"absolute":             {tar.Header{Typeflag: tar.TypeReg, Name: "/absolute"}, "absolute"},
		"through a link up":    {tar.Header{Typeflag: tar.TypeReg, Name: "up/top"}, "top"},
		"through a link out":   {tar.Header{Typeflag: tar.TypeReg, Name: "out/in"}, ""},
		"removed through it":   {tar.Header{Typeflag: tar.TypeReg, Name: "out/.wh.kept"}, ""},
		"hidden, with no name": {tar.Header{Typeflag: tar.TypeReg, Name: "d/.wh."}, ""},
		"hidden, above":        {tar.Header{Typeflag: tar.TypeReg, Name: "d/.wh..."}, ""},
		"hard link out":        {tar.Header{Typeflag: tar.TypeLink, Name: "x", Linkname: "out/kept"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir, outside := t.TempDir(), t.TempDir()
			must(t, os.Symlink(outside, filepath.Join(dir, "out")), os.Symlink("../../../../../../../..", filepath.Join(dir, "up")))
			must(t, os.WriteFile(filepath.Join(outside, "kept"), nil, 0o644))
			var archive bytes.Buffer
			w := tar.NewWriter(&archive)
			test.header.Uid, test.header.Gid = os.Getuid(), os.Getgid()
			must(t, w.WriteHeader(&test.header), w.Close())
			if err := layertar.Extract(t.Context(), &archive, dir); (err == nil) != (test.made != "") {
				t.Errorf("it ends with %v", err)
			}
			if _, err := os.Lstat(filepath.Join(dir, test.made)); err != nil {
				t.Error(err)
			}
			if entries, err := os.ReadDir(outside); err != nil || len(entries) != 1 {
				t.Errorf("outside there are %v, %v", entries, err)
			}
		})
	}
}

// What differs between a guest's root file system and its image makes of the image's layers what
// the guest has, and no more than that is sent.
func TestLayerOfRoot(t *testing.T) {
	program := containerd(t)
	source := t.TempDir()
	nastyTree(t, source)
	must(t, os.MkdirAll(source+"/gone/with/all", 0o755), os.MkdirAll(source+"/a/x/sub", 0o755), os.MkdirAll(source+"/b/x/sub", 0o755),
		os.WriteFile(source+"/a/x/sub/f", []byte("a"), 0o644), os.WriteFile(source+"/b/x/sub/f", []byte("bbb"), 0o644), os.WriteFile(source+"/b/x/only", nil, 0o644),
		os.WriteFile(source+"/large", bytes.Repeat([]byte("large"), 1<<20), 0o644))
	base := archiveOf(t, source, layertar.Options{})
	layers := packed(t, plain, base)
	path, err := written(t, layers, LayerOptions{})
	must(t, err)
	root := filepath.Join(t.TempDir(), "root")
	must(t, os.Mkdir(root, 0o755))
	if out, err := exec.CommandContext(t.Context(), "mount", "-o", "loop", path, root).CombinedOutput(); err != nil {
		t.Skipf("nothing can be mounted here: %v: %s", err, out)
	}
	t.Cleanup(func() { must(t, unix.Unmount(root, 0)) })
	known := func() *layertar.Base {
		var list bytes.Buffer
		must(t, workspace.WriteBase(t.Context(), &list, layers, ocilayer.Limits{}))
		b, err := layertar.ReadBase(&list)
		must(t, err)
		return b
	}
	skip := func(path string) layertar.Skip {
		if path == "lost+found" {
			return layertar.Whole
		}
		return layertar.Nothing
	}
	if nothing := archiveOf(t, root, layertar.Options{Base: known(), Skip: skip}); len(nothing) != 1024 {
		t.Errorf("of a root file system in which nothing has changed %d bytes are sent", len(nothing))
	}
	at := func(name string) string { return filepath.Join(root, name) }
	must(t,
		os.RemoveAll(at("gone")), os.Remove(at("dangling-too")), os.Remove(at("disk")), os.Remove(at("fifo")), os.Mkdir(at("fifo"), 0o700),
		os.RemoveAll(at("d")), os.WriteFile(at("d"), []byte("a file now"), 0o644),
		os.Chmod(at("usr/bin/ping"), 0o700), unix.Removexattr(at("user"), "user.binary"), os.Link(at("usr/bin/su"), at("su-too")),
		os.RemoveAll(at("b/x")), os.Rename(at("a/x"), at("b/x")), // of which the files are as they were
		os.WriteFile(at("new"), nil, 0o600),
	)
	want := listing(t, root)
	for path := range want {
		if strings.HasPrefix(path, "lost+found") {
			delete(want, path)
		}
	}
	// What is mounted is not seen, and neither is what it is mounted on.
	other := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(other, []byte("other"), 0o600), unix.Mount("tmpfs", at("usr"), "tmpfs", 0, "mode=1777"), unix.Mount(other, at("su-too"), "", unix.MS_BIND, ""))
	t.Cleanup(func() { must(t, unix.Unmount(at("usr"), 0), unix.Unmount(at("su-too"), 0)) })
	must(t, os.WriteFile(at("usr/mounted"), nil, 0o644))
	for _, path := range []string{"usr/bin/ping", "usr/bin/su"} { // of which the changes are hidden
		delete(want, path)
	}
	delete(want, "su-too")
	change := archiveOf(t, root, layertar.Options{Base: known(), Skip: skip})
	if len(change) > 100<<10 {
		t.Errorf("%d bytes are sent", len(change))
	}
	tree, err := applied(t, program, base, change)
	must(t, err)
	path, err = written(t, packed(t, plain, base, change), LayerOptions{})
	must(t, err)
	for name, got := range map[string]map[string]string{"containerd": listing(t, tree), "root file system": listing(t, mounted(t, path))} {
		for _, path := range []string{"usr/bin/ping", "usr/bin/su"} {
			delete(got, path)
		}
		equalTrees(t, name, got, want)
	}
}
