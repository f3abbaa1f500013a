package tree

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stream makes a stream of what is written to an encoder.
func stream(t testing.TB, write func(*Encoder)) *bytes.Buffer {
	t.Helper()
	var out bytes.Buffer
	e := NewEncoder(&out)
	write(e)
	check(t, e.Flush())
	return &out
}

func dir(name string) Entry {
	return Entry{Kind: Dir, Name: name, Mode: 0o755, ModTime: time.Unix(1, 0)}
}
func file(name string) Entry { return Entry{Kind: File, Name: name, Mode: 0o644, Size: 4} }
func symlink(name, to string) Entry {
	return Entry{Kind: Symlink, Name: name, Link: to, Mode: 0o777}
}

// write writes files with content, directories that stay open, and links.
func write(e *Encoder, entries ...Entry) {
	for _, entry := range entries {
		_ = e.Begin(entry)
		if entry.Kind == File {
			_ = e.Data([]byte("evil"))
			_ = e.EndFile("")
		}
	}
}

// canary is a directory with things that no stream may change.
type canary struct{ dir, target, before string }

func newCanary(t testing.TB) canary {
	t.Helper()
	c := canary{dir: t.TempDir()}
	layOut(t, c.dir, map[string]string{"victim": "victim", "secret/key": "key", "in/beside": "beside", "out": "->victim"})
	check(t, os.Chmod(filepath.Join(c.dir, "victim"), 0o600))
	c.target = filepath.Join(c.dir, "in", "target")
	c.before = c.show(t)
	return c
}

// show lists all but the target, with the times of last changes but those of the
// directory that holds the target.
func (c canary) show(t testing.TB) string {
	t.Helper()
	var out strings.Builder
	check(t, filepath.WalkDir(c.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path == c.target {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		out.WriteString(info.Mode().String() + " " + path)
		if path != filepath.Dir(c.target) {
			out.WriteString(info.ModTime().String())
		}
		if info.Mode().IsRegular() {
			text, _ := os.ReadFile(path)
			out.Write(text)
		}
		out.WriteByte('\n')
		return nil
	}))
	return out.String()
}

func (c canary) check(t testing.TB) {
	t.Helper()
	if after := c.show(t); after != c.before {
		t.Errorf("outside of the target it has become\n%sfrom\n%s", after, c.before)
	}
}

// Whatever a sender tries, nothing outside the target appears or changes (S2, S7).
func TestMaliciousStreams(t *testing.T) {
	for name, attempt := range map[string]func(*Encoder){
		"dot dot":            func(e *Encoder) { write(e, dir(""), file("..")) },
		"dot dot path":       func(e *Encoder) { write(e, dir(""), file("../evil")) },
		"dot dot directory":  func(e *Encoder) { write(e, dir(""), dir(".."), file("evil")) },
		"dot":                func(e *Encoder) { write(e, dir(""), dir(".")) },
		"no name":            func(e *Encoder) { write(e, dir(""), file("")) },
		"absolute":           func(e *Encoder) { write(e, dir(""), file("/tmp/evil")) },
		"slash":              func(e *Encoder) { write(e, dir(""), file("a/b")) },
		"NUL":                func(e *Encoder) { write(e, dir(""), file("a\x00b")) },
		"root is a link":     func(e *Encoder) { write(e, symlink("", "../victim")) },
		"root has a name":    func(e *Encoder) { write(e, file("evil")) },
		"root is a hardlink": func(e *Encoder) { write(e, Entry{Kind: HardLink, Link: "../victim"}) },
		"root comes twice":   func(e *Encoder) { write(e, file(""), file("")) },
		"hard link":          func(e *Encoder) { write(e, dir(""), Entry{Kind: HardLink, Name: "h", Link: "../../victim"}) },
		"leave the root":     func(e *Encoder) { write(e, dir("")); _ = e.Leave(); write(e, file("evil")) },
		"leave more":         func(e *Encoder) { write(e, dir("")); _ = e.Leave(); _ = e.Leave() },
		"file in a file":     func(e *Encoder) { _ = e.Begin(file("")); write(e, file("x")) },
		"content of nothing": func(e *Encoder) { write(e, dir("")); _ = e.Data([]byte("x")) },
		"end in a file":      func(e *Encoder) { _ = e.Begin(file("")); _ = e.End() },
		"end in a directory": func(e *Encoder) { write(e, dir("")); _ = e.End() },
		"nothing":            func(*Encoder) {},
		"only an end":        func(e *Encoder) { _ = e.End() },
		"unknown kind":       func(e *Encoder) { write(e, dir("")); _ = e.frame('?', nil) },
		"a device":           func(e *Encoder) { write(e, dir(""), Entry{Kind: 'C', Name: "dev"}) },
		"a huge frame":       func(e *Encoder) { write(e, dir("")); _, _ = e.w.Write([]byte{'D', 0xff, 0xff, 0xff, 0xff}) },
		"long data":          func(e *Encoder) { _ = e.Begin(file("")); _ = e.Data(make([]byte, maxChunk+1)) },
		"a negative hole":    func(e *Encoder) { _ = e.Begin(file("")); _ = e.Hole(-1); _ = e.EndFile(""); _ = e.End() },
		"holes beyond all":   func(e *Encoder) { _ = e.Begin(file("")); _ = e.Hole(math.MaxInt64); _ = e.Hole(1) },
		"through a link":     func(e *Encoder) { write(e, dir(""), symlink("up", "sub"), dir("up"), file("evil")); _ = e.End() },
		"bad nanoseconds": func(e *Encoder) {
			_ = e.frame('D', append([]byte{0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, make([]byte, 11)...))
		},
		"a failure of no kind": func(e *Encoder) { _ = e.frame(frameFail, []byte{1}) },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCanary(t)
			if _, err := unpack(t, stream(t, attempt), Target{Path: c.target, Name: "t", Untrusted: true}); err == nil {
				t.Error("it is taken")
			}
			c.check(t)
		})
	}
}

// A copy to the same place twice, as a job does, gives a guest no second chance: what
// it has made there the first time is not followed (S2).
func TestSecondCopy(t *testing.T) {
	c := newCanary(t)
	escape := stream(t, func(e *Encoder) { write(e, symlink("", "../victim")); _ = e.End() })
	if _, err := unpack(t, escape, Target{Path: c.target, Untrusted: true}); !errors.Is(err, ErrProtocol) {
		t.Errorf("a link as the root: %v", err)
	}
	// Should it have got there in another way, it is replaced.
	check(t, os.Symlink("../victim", c.target))
	one := stream(t, func(e *Encoder) { write(e, file("")); _ = e.End() })
	if _, err := unpack(t, one, Target{Path: c.target, Untrusted: true}); err != nil {
		t.Error(err)
	}
	c.check(t)
	if info, err := os.Lstat(c.target); err != nil || !info.Mode().IsRegular() {
		t.Errorf("the target is %v (%v)", info.Mode(), err)
	}
}

// Links in a tree, and what is sent to go through them.
func TestLinks(t *testing.T) {
	for to, out := range map[string]bool{
		"/etc/passwd": true, "..": false, "../..": true, "../x": false, "../../x": true, "x/../../..": true, "a/..": true,
		"x": false, "./x": false, ".././x": false, "./.././../x": true, "": false, "x/y/z": false, "../x/y": false,
	} {
		if got := LeadsOut(to, 1); got != out {
			t.Errorf("LeadsOut(%q) = %v", to, got)
		}
	}
	for _, test := range []struct {
		untrusted, keep bool
		want            string
	}{
		{true, false, "in\n"}, {true, true, "in out up\n"}, {false, false, "in out up\n"},
	} {
		c := newCanary(t)
		notes, err := unpack(t, stream(t, func(e *Encoder) {
			write(e, dir(""), symlink("in", "file"), symlink("out", "/etc/passwd"), symlink("up", "../victim"))
			_ = e.Leave()
			_ = e.End()
		}), Target{Path: c.target, Untrusted: test.untrusted, KeepLinks: test.keep})
		if err != nil {
			t.Error(err)
		}
		entries, err := os.ReadDir(c.target)
		check(t, err)
		var names []string
		for _, entry := range entries {
			names = append(names, entry.Name())
		}
		if got := strings.Join(names, " ") + "\n"; got != test.want {
			t.Errorf("%+v: there is %s", test, got)
		}
		if told := strings.Count(notes, "leads out of"); told != 3-len(names) {
			t.Errorf("notes are %q", notes)
		}
		c.check(t)
	}
}

// Links that are in the target already are not followed, and neither are such that the
// stream has made.
func TestNothingGoesThroughLinks(t *testing.T) {
	c := newCanary(t)
	layOut(t, c.target, map[string]string{"file": "->../../victim", "dir": "->../../secret", "fifo": "|", "kept/x": "x"})
	check(t, os.Chmod(c.target, 0o700))
	notes, err := unpack(t, stream(t, func(e *Encoder) {
		write(e, dir(""), file("file"), dir("dir"), file("key"))
		_ = e.Leave()
		write(e, file("fifo"), file("kept"), symlink("kept", "file"), dir("file"), file("x"))
		_ = e.Leave()
		write(e, file("last"))
		_ = e.Leave()
		_ = e.End()
	}), Target{Path: c.target, Contents: true, Untrusted: true})
	if err != nil {
		t.Fatal(err)
	}
	c.check(t)
	for _, want := range []string{"/dir: it is not a directory", "/fifo: it is a FIFO", "/kept: it is a directory", "/file: it is not a directory"} {
		if !strings.Contains(notes, want) {
			t.Errorf("notes are\n%swant %q", notes, want)
		}
	}
	for _, name := range []string{"file", "last"} {
		if info, err := os.Lstat(filepath.Join(c.target, name)); err != nil || !info.Mode().IsRegular() {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Whoever made the directory decides about it, not the sender.
	if info, err := os.Stat(c.target); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the mode of the target is %v (%v)", info.Mode(), err)
	}
}

func TestSetID(t *testing.T) {
	const special = fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
	for untrusted, want := range map[bool][2]fs.FileMode{false: {special, special}, true: {0, fs.ModeSticky}} {
		target := filepath.Join(t.TempDir(), "t")
		_, err := unpack(t, stream(t, func(e *Encoder) {
			write(e, Entry{Kind: Dir, Mode: 0o7755}, Entry{Kind: File, Name: "f", Mode: 0o7755})
			_ = e.Leave()
			_ = e.End()
		}), Target{Path: target, Untrusted: untrusted})
		check(t, err)
		for i, path := range []string{target + "/f", target} {
			if info, err := os.Stat(path); err != nil || info.Mode()&special != want[i] {
				t.Errorf("untrusted %v: mode of %s is %v (%v)", untrusted, path, info.Mode(), err)
			}
		}
	}
}

// A sender can't make the receiver hold more the more it sends (S7).
func TestMemory(t *testing.T) {
	reader, writer := io.Pipe()
	go func() {
		e := NewEncoder(writer)
		_ = e.Begin(dir(""))
		for range 4000 { // the same directory again and again, with the longest names
			_ = e.Begin(dir("d" + strings.Repeat("x", 200)))
			_ = e.Note(Note{Path: strings.Repeat("p", 5000), Text: strings.Repeat("t", 5000)})
			_ = e.Leave()
		}
		for range 500 { // much deeper than any path
			_ = e.Begin(dir(strings.Repeat("y", 250)))
			_ = e.Note(Note{Path: "p", Text: "t"}) // at the last of which it is measured
		}
		for range 501 {
			_ = e.Leave()
		}
		_ = e.End()
		_ = writer.Close()
	}()
	files, held := openFiles(t), heldBytes()
	d := NewDecoder(reader)
	most, mostHeld := 0, int64(0)
	notes := 0
	d.Note = func(Note) {
		if notes++; notes%500 == 0 {
			most, mostHeld = max(most, openFiles(t)), max(mostHeld, heldBytes())
		}
	}
	if err := Receive(t.Context(), d, Target{Path: filepath.Join(t.TempDir(), "t"), Untrusted: true}, func(Note) {}); err != nil {
		t.Fatal(err)
	}
	if mostHeld-held > 1<<20 {
		t.Errorf("%d bytes were held, %d before", mostHeld, held)
	}
	if most > files+4 {
		t.Errorf("%d files were open, %d before", most, files)
	}
}

// heldBytes returns how much of the heap is in use. What the heap has reserved depends on how
// often garbage is collected, and so on how busy the host is.
func heldBytes() int64 {
	var stats runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	return len(entries)
}

func TestLimits(t *testing.T) {
	deep := func(e *Encoder) {
		for i := range maxDepth + 1 {
			_ = e.Begin(dir(strings.Repeat("d", min(i, 1))))
		}
	}
	for name, test := range map[string]struct {
		limits Limits
		write  func(*Encoder)
	}{
		"entries": {Limits{MaxEntries: 3}, func(e *Encoder) { write(e, dir(""), file("a"), file("b"), file("c")) }},
		"notes":   {Limits{MaxEntries: 3}, func(e *Encoder) { write(e, dir(""), file("a")); _ = e.Note(Note{}); _ = e.Note(Note{}) }},
		"bytes":   {Limits{MaxBytes: 7}, func(e *Encoder) { write(e, dir(""), file("a"), file("b")) }},
		"holes":   {Limits{MaxBytes: 7}, func(e *Encoder) { _ = e.Begin(file("")); _ = e.Hole(8) }},
		"depth":   {Limits{}, deep},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCanary(t)
			d := NewDecoder(stream(t, test.write))
			d.Limits = test.limits
			if err := Receive(t.Context(), d, Target{Path: c.target, Untrusted: true}, func(Note) {}); !errors.Is(err, ErrLimit) {
				t.Errorf("error is %v", err)
			}
			c.check(t)
		})
	}
}

// What the other side says of its failure can be matched.
func TestFailure(t *testing.T) {
	for _, reason := range []error{fs.ErrNotExist, fs.ErrPermission, unix.ENOSPC} {
		_, err := unpack(t, stream(t, func(e *Encoder) { _ = e.Fail(&fs.PathError{Op: "open", Path: "x", Err: reason}) }), Target{Path: t.TempDir()})
		if !errors.Is(err, reason) || !IsRemote(err) {
			t.Errorf("%v has become %v", reason, err)
		}
	}
}

// FuzzReceive sends anything to a directory with canaries beside it. What makes sense
// is changed by the fuzzer into what does not.
func FuzzReceive(f *testing.F) {
	f.Add(stream(f, func(e *Encoder) {
		write(e, dir(""), file("a"), symlink("l", "../../victim"), dir("d"), file("b"))
		_ = e.Hole(5000)
		_ = e.Leave()
		write(e, symlink("d", "/tmp"), dir("l"), file("victim"))
		_ = e.Leave()
		_ = e.Note(Note{Path: "p", Text: "t"})
		_ = e.Leave()
		_ = e.End()
	}).Bytes(), true)
	f.Add(stream(f, func(e *Encoder) { write(e, dir(""), Entry{Kind: HardLink, Name: "h", Link: "../../victim"}) }).Bytes(), false)
	f.Add(stream(f, func(e *Encoder) { write(e, symlink("", "../victim")) }).Bytes(), false)
	f.Add(stream(f, func(e *Encoder) { write(e, file("")); _ = e.Fail(unix.EIO) }).Bytes(), true)
	f.Fuzz(func(t *testing.T, content []byte, there bool) {
		c := newCanary(t)
		if there {
			layOut(t, c.target, map[string]string{"l": "->../../secret", "a": "->../../victim", "d/b": "old"})
		}
		d := NewDecoder(bytes.NewReader(content))
		d.Limits = Limits{MaxBytes: 1 << 20, MaxEntries: 1000}
		_ = Receive(t.Context(), d, Target{Path: c.target, Contents: there, Untrusted: true}, func(Note) {})
		c.check(t)
		temps, err := filepath.Glob(filepath.Join(c.dir, "*", ".smolvm-*"))
		if err != nil || len(temps) > 0 {
			t.Errorf("%v is left (%v)", temps, err)
		}
	})
}
