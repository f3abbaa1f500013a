package agent_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/guest"
	"github.com/smolvm/smolvm/internal/agent/tree"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// connect returns a client of the agent's server, which runs in this process and so has
// the same files.
func connect(t *testing.T) *agent.Client {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	signer, err := ssh.NewSignerFromKey(key)
	check(t, err)
	server := guest.NewServer()
	check(t, server.SetIdentity(wire.Hello{HostKey: key}))
	return dial(t, signer, server.ServeTrusted)
}

func dial(t *testing.T, signer ssh.Signer, serve func(net.Conn)) *agent.Client {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go serve(conn)
		}
	}()
	client := agent.NewClient(agent.ClientConfig{
		Dial: func(ctx context.Context) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", listener.Addr().String())
		},
		User: "root", Signer: signer, HostKey: signer.PublicKey(),
	})
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func layOut(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := dir + "/" + name
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		if target, ok := strings.CutPrefix(text, "->"); ok {
			check(t, os.Symlink(target, path))
			continue
		}
		check(t, os.WriteFile(path, []byte(text), 0o644))
	}
	return dir
}

func checkFiles(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	for name, text := range want {
		if got, err := os.ReadFile(dir + "/" + name); err != nil || string(got) != text {
			t.Errorf("%s is %q (%v), want %q", name, got, err, text)
		}
	}
}

// Files go in, out and across, whatever their names are (case 4).
func TestCopy(t *testing.T) {
	c, other := connect(t), connect(t)
	files := map[string]string{"tree/a": "one", "tree/b\xff\xfe": "two", "tree/d\n/\"": "three", "tree/empty": "", "tree/in": "->a"}
	source, dir := layOut(t, files), t.TempDir()
	for name, copied := range map[string]func(to string) error{
		"in\xff":  func(to string) error { return c.CopyTo(t.Context(), source+"/tree", to, agent.CopyOptions{}) },
		"out\xff": func(to string) error { return c.CopyFrom(t.Context(), source+"/tree", to, agent.CopyOptions{}) },
		"across\xff": func(to string) error {
			return agent.CopyBetween(t.Context(), c, source+"/tree", other, to, agent.CopyOptions{})
		},
		"tar\xff": func(to string) error {
			check(t, os.Mkdir(to, 0o755))
			reader, writer := io.Pipe()
			go func() {
				_ = writer.CloseWithError(c.GetTar(t.Context(), source+"/tree/.", writer, agent.CopyOptions{}))
			}()
			return other.PutTar(t.Context(), reader, to, agent.CopyOptions{})
		},
	} {
		if err := copied(filepath.Join(dir, name)); err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		for file, want := range files {
			got, err := os.ReadFile(filepath.Join(dir, name, strings.TrimPrefix(file, "tree/")))
			if file == "tree/in" {
				want = "one"
			}
			if err != nil || string(got) != want {
				t.Errorf("%q: %q is %q (%v)", name, file, got, err)
			}
		}
	}
	if names, err := filepath.Glob(dir + "/*"); err != nil || len(names) != 4 {
		t.Errorf("there are %q (%v)", names, err)
	}
	// A file by its own name, in and out.
	for _, err := range []error{
		c.CopyTo(t.Context(), source+"/tree/b\xff\xfe", dir, agent.CopyOptions{}),
		c.CopyFrom(t.Context(), dir+"/b\xff\xfe", dir+"/back\xff", agent.CopyOptions{}),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	checkFiles(t, dir, map[string]string{"b\xff\xfe": "two", "back\xff": "two"})
}

// Errors say which side they are of, and can be matched.
func TestCopyErrors(t *testing.T) {
	c := connect(t)
	dir := layOut(t, map[string]string{"f": "file"})
	for name, test := range map[string]struct {
		err  error
		is   error
		text string
	}{
		"no source in the guest":   {c.CopyFrom(t.Context(), dir+"/none", dir, agent.CopyOptions{}), fs.ErrNotExist, "guest: read "},
		"no source on the host":    {c.CopyTo(t.Context(), dir+"/none", dir, agent.CopyOptions{}), fs.ErrNotExist, "read "},
		"no parent in the guest":   {c.CopyTo(t.Context(), dir+"/f", dir+"/no/f", agent.CopyOptions{}), fs.ErrNotExist, "guest: write "},
		"no parent on the host":    {c.CopyFrom(t.Context(), dir+"/f", dir+"/no/f", agent.CopyOptions{}), fs.ErrNotExist, "write "},
		"empty source":             {c.CopyTo(t.Context(), "", dir, agent.CopyOptions{}), tree.ErrEmptyPath, "empty path"},
		"empty target":             {c.CopyTo(t.Context(), dir, "", agent.CopyOptions{}), tree.ErrEmptyPath, "empty path"},
		"empty source out":         {c.CopyFrom(t.Context(), "", dir, agent.CopyOptions{}), tree.ErrEmptyPath, "empty path"},
		"empty target out":         {c.CopyFrom(t.Context(), dir, "", agent.CopyOptions{}), tree.ErrEmptyPath, "empty path"},
		"empty target of a tar":    {c.PutTar(t.Context(), strings.NewReader("x"), "", agent.CopyOptions{}), tree.ErrEmptyPath, "empty path"},
		"NUL":                      {c.CopyTo(t.Context(), dir+"\x00", dir, agent.CopyOptions{}), fs.ErrInvalid, "NUL"},
		"not into a directory":     {c.CopyTo(t.Context(), dir+"/f", dir+"/g", agent.CopyOptions{IntoDir: true}), nil, "no such directory"},
		"not into a directory out": {c.CopyFrom(t.Context(), dir+"/f", dir+"/f", agent.CopyOptions{IntoDir: true}), nil, "not a directory"},
		"too much":                 {c.CopyFrom(t.Context(), dir+"/f", dir+"/h", agent.CopyOptions{Limits: tree.Limits{MaxBytes: 3}}), tree.ErrLimit, ""},
		"an empty tar stream":      {c.PutTar(t.Context(), strings.NewReader(""), dir, agent.CopyOptions{}), nil, "empty"},
		"no tar stream":            {c.PutTar(t.Context(), strings.NewReader(strings.Repeat("x", 2000)), dir, agent.CopyOptions{}), tar.ErrHeader, ""},
	} {
		if test.err == nil || test.is != nil && !errors.Is(test.err, test.is) || !strings.Contains(test.err.Error(), test.text) {
			t.Errorf("%s: %v", name, test.err)
		}
	}
	if names, _ := filepath.Glob(dir + "/*"); !slices.Equal(names, []string{dir + "/f"}) {
		t.Errorf("there are %q", names)
	}
}

// What is left out is told, with its side, and the rest is copied.
func TestCopyNotes(t *testing.T) {
	c := connect(t)
	source := layOut(t, map[string]string{"ok": "ok", "is-dir": "file", "out": "->/etc/passwd"})
	target := layOut(t, map[string]string{"is-dir/x": "x"})
	type told struct {
		side agent.Side
		text string
	}
	var notes []told
	opts := agent.CopyOptions{Note: func(side agent.Side, note tree.Note) { notes = append(notes, told{side, note.String()}) }}
	for name, err := range map[string]error{
		"to":   c.CopyTo(t.Context(), source+"/.", target, opts),
		"from": c.CopyFrom(t.Context(), source+"/.", target, opts),
	} {
		if !errors.Is(err, agent.ErrIncomplete) || !strings.Contains(err.Error(), "is-dir: it is a directory") {
			t.Errorf("%s: %v", name, err)
		}
	}
	checkFiles(t, target, map[string]string{"ok": "ok", "is-dir/x": "x"})
	for _, want := range []string{"/is-dir: it is a directory", "/out: left out: it is a symbolic link"} {
		if !slices.ContainsFunc(notes, func(n told) bool { return n.side == agent.Target && strings.Contains(n.text, want) }) {
			t.Errorf("notes are %v, want %q", notes, want)
		}
	}
}

// evil connects to a guest that takes the place of the agent: it answers the opening of
// a copy's channel with serve.
func evil(t *testing.T, serve func(ssh.Channel)) *agent.Client {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	signer, err := ssh.NewSignerFromKey(key)
	check(t, err)
	return dial(t, signer, func(conn net.Conn) {
		config := &ssh.ServerConfig{NoClientAuth: true}
		config.AddHostKey(signer)
		_, channels, requests, err := ssh.NewServerConn(conn, config)
		if err != nil {
			return
		}
		go ssh.DiscardRequests(requests)
		for opened := range channels {
			if channel, requests, err := opened.Accept(); err == nil {
				go func() { // and never closes it
					for range requests {
						continue
					}
				}()
				go serve(channel)
			}
		}
	})
}

// A copy ends with its context whatever the guest, the reader or the writer does, and
// leaves nothing half done.
func TestCopyEndsWithItsContext(t *testing.T) {
	hold := make(chan struct{})
	t.Cleanup(func() { close(hold) })
	silent := func(ssh.Channel) { <-hold }
	half := func(channel ssh.Channel) {
		e := tree.NewEncoder(channel)
		_ = e.Begin(tree.Entry{Kind: tree.File, Size: 100})
		_ = e.Data([]byte("half"))
		_ = e.Flush()
		<-hold
	}
	reads := func(channel ssh.Channel) { _, _ = io.Copy(io.Discard, channel) }
	large := layOut(t, map[string]string{"f": strings.Repeat("x", 8<<20)})
	stuck := readFunc(func([]byte) (int, error) { <-hold; return 0, io.EOF })
	for name, test := range map[string]struct {
		serve func(ssh.Channel)
		run   func(ctx context.Context, c *agent.Client, dir string) error
	}{
		"from a silent guest": {silent, func(ctx context.Context, c *agent.Client, dir string) error {
			return c.CopyFrom(ctx, "/f", dir+"/new", agent.CopyOptions{})
		}},
		"in the middle of a new file": {half, func(ctx context.Context, c *agent.Client, dir string) error {
			return c.CopyFrom(ctx, "/f", dir+"/new", agent.CopyOptions{})
		}},
		"in the middle of an old file": {half, func(ctx context.Context, c *agent.Client, dir string) error {
			return c.CopyFrom(ctx, "/f", dir+"/old", agent.CopyOptions{})
		}},
		"to a guest that does not read": {silent, func(ctx context.Context, c *agent.Client, _ string) error {
			return c.CopyTo(ctx, large, "/x", agent.CopyOptions{})
		}},
		"to a guest that does not answer": {reads, func(ctx context.Context, c *agent.Client, dir string) error {
			return c.CopyTo(ctx, dir, "/x", agent.CopyOptions{})
		}},
		"across": {silent, func(ctx context.Context, c *agent.Client, _ string) error {
			return agent.CopyBetween(ctx, c, "/x", c, "/y", agent.CopyOptions{})
		}},
		"from a reader": {reads, func(ctx context.Context, c *agent.Client, _ string) error {
			return c.PutTar(ctx, stuck, "/x", agent.CopyOptions{})
		}},
		"to a writer": {half, func(ctx context.Context, c *agent.Client, _ string) error {
			return c.GetTar(ctx, "/x", writeFunc(func([]byte) (int, error) { <-hold; return 0, io.EOF }), agent.CopyOptions{})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := evil(t, test.serve)
			dir := layOut(t, map[string]string{"old": "old"})
			cause := errors.New("given up")
			ctx, cancel := context.WithCancelCause(t.Context())
			timer := time.AfterFunc(200*time.Millisecond, func() { cancel(cause) })
			defer timer.Stop()
			ended := make(chan error)
			go func() { ended <- test.run(ctx, c, dir) }()
			select {
			case err := <-ended:
				if !errors.Is(err, cause) {
					t.Errorf("error is %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("it goes on")
			}
			entries, err := os.ReadDir(dir)
			check(t, err)
			if len(entries) != 1 {
				t.Errorf("there are %v", entries)
			}
			checkFiles(t, dir, map[string]string{"old": "old"})
		})
	}
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

type writeFunc func([]byte) (int, error)

func (f writeFunc) Write(p []byte) (int, error) { return f(p) }

// A guest that ends a copy into it says why, and the sender stops.
func TestGuestRefuses(t *testing.T) {
	c := evil(t, func(channel ssh.Channel) {
		_ = tree.NewEncoder(channel).Fail(fmt.Errorf("write /x: %w", fs.ErrPermission))
	})
	large := layOut(t, map[string]string{"f": strings.Repeat("x", 8<<20)})
	if err := c.CopyTo(t.Context(), large, "/x", agent.CopyOptions{}); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("error is %v", err)
	}
}

// A guest can't flood the caller with notes, nor hide a failure by sending many.
func TestManyNotes(t *testing.T) {
	c := evil(t, func(channel ssh.Channel) {
		e := tree.NewEncoder(channel)
		_ = e.Begin(tree.Entry{Kind: tree.Dir, Mode: 0o755})
		for range 5000 {
			_ = e.Note(tree.Note{Path: "p", Text: "text"})
		}
		_ = e.Note(tree.Note{Path: "last", Text: "failed", Failed: true})
		_ = e.Leave()
		_ = e.End()
	})
	told := 0
	err := c.CopyFrom(t.Context(), "/x", t.TempDir(), agent.CopyOptions{Note: func(agent.Side, tree.Note) { told++ }})
	if !errors.Is(err, agent.ErrIncomplete) || !strings.Contains(err.Error(), "last: failed") || told > 22 {
		t.Errorf("%d were told, error is %v", told, err)
	}
}

// A tar stream has what docker cp's has.
func TestTarStream(t *testing.T) {
	c := connect(t)
	source := layOut(t, map[string]string{"d/f": "file", "d/in": "->f", "d/out": "->/etc/passwd", "d/sub/b\xff": "bytes"})
	for path, want := range map[string]string{
		"/d":   "d/ d/f d/in d/sub/ d/sub/b\xff",
		"/d/.": "./ ./f ./in ./sub/ ./sub/b\xff",
		"/d/f": "f",
	} {
		var stream bytes.Buffer
		check(t, c.GetTar(t.Context(), source+path, &stream, agent.CopyOptions{}))
		var names []string
		for in := tar.NewReader(&stream); ; {
			header, err := in.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			check(t, err)
			names = append(names, header.Name)
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	// A file of the kernel's says that it is empty, and is not.
	var stream bytes.Buffer
	check(t, c.GetTar(t.Context(), "/proc/self/status", &stream, agent.CopyOptions{}))
	in := tar.NewReader(&stream)
	if _, err := in.Next(); err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(in); err != nil || !bytes.HasPrefix(text, []byte("Name:")) {
		t.Errorf("it is %q (%v)", text, err)
	}
}

// A tar stream of others' making: no order, no directories, names that lead out.
func TestForeignTarStream(t *testing.T) {
	c := connect(t)
	var stream bytes.Buffer
	out := tar.NewWriter(&stream)
	for _, header := range []tar.Header{
		{Name: "a/b/c", Typeflag: tar.TypeReg, Mode: 0o600, Size: 3},
		{Name: "/a/d", Typeflag: tar.TypeReg, Mode: 0o4755, Size: 3},
		{Name: "./a/b/e/", Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: "a/hard", Typeflag: tar.TypeLink, Linkname: "a/b/c"},
		{Name: "a/soft", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
		{Name: "../evil", Typeflag: tar.TypeReg, Mode: 0o600, Size: 3},
		{Name: "fifo", Typeflag: tar.TypeFifo, Mode: 0o600},
		{Name: "zeros", Typeflag: tar.TypeReg, Mode: 0o600, Size: 200_000},
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: "last", Typeflag: tar.TypeReg, Mode: 0o600, Size: 3},
	} {
		check(t, out.WriteHeader(&header))
		if header.Size == 3 {
			_, err := io.WriteString(out, "abc")
			check(t, err)
		} else {
			_, err := out.Write(make([]byte, header.Size))
			check(t, err)
		}
	}
	check(t, out.Close())
	whole := stream.Bytes()
	dir := t.TempDir()
	err := c.PutTar(t.Context(), bytes.NewReader(whole), dir+"/.", agent.CopyOptions{})
	if !errors.Is(err, agent.ErrIncomplete) || !strings.Contains(err.Error(), "../evil") {
		t.Errorf("error is %v", err)
	}
	checkFiles(t, dir, map[string]string{"a/b/c": "abc", "a/d": "abc", "a/hard": "abc", "last": "abc", "zeros": string(make([]byte, 200_000))})
	for name, want := range map[string]fs.FileMode{"a/b/e": fs.ModeDir | 0o700, "a/d": fs.ModeSetuid | 0o755} {
		if info, err := os.Stat(dir + "/" + name); err != nil || info.Mode() != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	// One that is cut off leaves no half of a file.
	cut := t.TempDir()
	if err := c.PutTar(t.Context(), bytes.NewReader(whole[:len(whole)-100_000]), cut, agent.CopyOptions{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(cut + "/zeros"); err == nil {
		t.Error("half of a file is there")
	}
}
