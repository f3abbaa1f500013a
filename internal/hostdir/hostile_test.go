package hostdir

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// guest is a guest that sends what it likes.
type guest struct {
	t      testing.TB
	conn   net.Conn
	unique uint64
}

// newGuest serves a directory to a guest.
func newGuest(t testing.TB, dir string, opts Options) *guest {
	t.Helper()
	d, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = d.Serve(context.Background(), ours)
	}()
	t.Cleanup(func() {
		_ = theirs.Close()
		<-done
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	g := &guest{t: t, conn: theirs}
	if _, errno := g.ask(opInit, 0, u32(protocolMajor), u32(protocolMinor), u32(0), u32(^uint32(0))); errno != 0 {
		t.Fatal(errno)
	}
	return g
}

func u32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func u64(v uint64) []byte { return binary.NativeEndian.AppendUint64(nil, v) }
func z(name string) []byte {
	return append([]byte(name), 0)
}

func message(op opcode, unique, node uint64, body []byte) []byte {
	m := binary.NativeEndian.AppendUint32(nil, uint32(requestHeader+len(body)))
	m = binary.NativeEndian.AppendUint32(m, uint32(op))
	m = binary.NativeEndian.AppendUint64(m, unique)
	m = binary.NativeEndian.AppendUint64(m, node)
	return append(append(m, make([]byte, 16)...), body...)
}

// ask sends a request, and returns the answer.
func (g *guest) ask(op opcode, node uint64, parts ...[]byte) (*fields, unix.Errno) {
	g.t.Helper()
	g.unique++
	_ = g.conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := g.conn.Write(message(op, g.unique, node, bytes.Join(parts, nil))); err != nil {
		g.t.Fatal(err)
	}
	for {
		header := make([]byte, answerHeader)
		if _, err := io.ReadFull(g.conn, header); err != nil {
			g.t.Fatal(err)
		}
		body := make([]byte, binary.NativeEndian.Uint32(header)-answerHeader)
		if _, err := io.ReadFull(g.conn, body); err != nil {
			g.t.Fatal(err)
		}
		if binary.NativeEndian.Uint64(header[8:]) == g.unique { // else it is a notice
			return &fields{rest: body}, unix.Errno(-int32(binary.NativeEndian.Uint32(header[4:])))
		}
	}
}

// find looks names up, one in the other.
func (g *guest) find(names ...string) uint64 {
	g.t.Helper()
	node := uint64(rootID)
	for _, name := range names {
		found, errno := g.ask(opLookup, node, z(name))
		if errno != 0 {
			g.t.Fatalf("%s: %v", name, errno)
		}
		node = found.u64()
	}
	return node
}

// outside makes a directory to share, beside a secret, and returns it.
func outside(t testing.TB) string {
	t.Helper()
	top := t.TempDir()
	dir := filepath.Join(top, "shared")
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "sub", "deep"), 0o755),
		os.Mkdir(filepath.Join(top, "private"), 0o755),
		os.WriteFile(filepath.Join(top, "secret"), []byte("secret"), 0o600),
		os.WriteFile(filepath.Join(top, "private", "secret"), []byte("secret"), 0o600),
		os.WriteFile(filepath.Join(dir, "file"), []byte("file"), 0o644),
		os.Symlink("../secret", filepath.Join(dir, "link")),
		os.Symlink("../private", filepath.Join(dir, "dirlink")),
		os.Symlink("/", filepath.Join(dir, "root")),
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o666),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// No name and no number leads a guest out of the directory, and nothing but files is opened.
func TestNothingLeadsOut(t *testing.T) {
	t.Parallel()
	dir := outside(t)
	g := newGuest(t, dir, Options{})
	root, file, link, dirlink, fifo := uint64(rootID), g.find("file"), g.find("link"), g.find("dirlink"), g.find("fifo")
	open := func(op opcode, node uint64, parts ...[]byte) func() unix.Errno {
		return func() unix.Errno {
			_, errno := g.ask(op, node, parts...)
			return errno
		}
	}
	long := string(bytes.Repeat([]byte("x"), 256))
	for name, test := range map[string]struct {
		do   func() unix.Errno
		want unix.Errno
	}{
		"parent":            {open(opLookup, root, z("..")), unix.EINVAL},
		"itself":            {open(opLookup, root, z(".")), unix.EINVAL},
		"nothing":           {open(opLookup, root, z("")), unix.EINVAL},
		"path":              {open(opLookup, root, z("sub/deep")), unix.EINVAL},
		"absolute":          {open(opLookup, root, z("/etc")), unix.EINVAL},
		"no end":            {open(opLookup, root, []byte("file")), unix.EINVAL},
		"long":              {open(opLookup, root, z(long)), unix.ENAMETOOLONG},
		"through a link":    {open(opLookup, dirlink, z("secret")), unix.ENOTDIR},
		"through a file":    {open(opLookup, file, z("secret")), unix.ENOTDIR},
		"unknown node":      {open(opLookup, 12345, z("file")), unix.ESTALE},
		"open a link":       {open(opOpen, link, u32(0), u32(0)), unix.EPERM},
		"list a link":       {open(opOpendir, dirlink, u32(0), u32(0)), unix.ENOTDIR},
		"open a FIFO":       {open(opOpen, fifo, u32(0), u32(0)), unix.EPERM},
		"create over it":    {open(opCreate, root, u32(unix.O_WRONLY), u32(0o644), u32(0), u32(0), z("fifo")), unix.EPERM},
		"create over link":  {open(opCreate, root, u32(unix.O_WRONLY|unix.O_TRUNC), u32(0o644), u32(0), u32(0), z("link")), unix.EPERM},
		"create above":      {open(opCreate, root, u32(unix.O_WRONLY), u32(0o644), u32(0), u32(0), z("../new")), unix.EINVAL},
		"truncate a link":   {open(opSetattr, link, u32(setSize), make([]byte, 84)), unix.EINVAL},
		"device":            {open(opMknod, root, u32(unix.S_IFCHR|0o666), u32(0x103), u32(0), u32(0), z("null")), unix.EPERM},
		"block device":      {open(opMknod, root, u32(unix.S_IFBLK|0o666), u32(0x800), u32(0), u32(0), z("sda")), unix.EPERM},
		"rename above":      {open(opRename, root, u64(root), z("file"), z("../file")), unix.EINVAL},
		"rename into link":  {open(opRename, root, u64(dirlink), z("file"), z("file")), unix.ENOTDIR},
		"link into link":    {open(opLink, dirlink, u64(file), z("file")), unix.ENOTDIR},
		"remove above":      {open(opUnlink, root, z("../secret")), unix.EINVAL},
		"foreign handle":    {open(opRead, file, u64(99), u64(0), u32(10), make([]byte, 20)), unix.EBADF},
		"huge read":         {open(opRead, file, u64(99), u64(0), u32(1<<31), make([]byte, 20)), unix.EINVAL},
		"short write":       {open(opWrite, file, u64(99), u64(0), u32(1000), make([]byte, 20)), unix.EINVAL},
		"trusted attribute": {open(opSetxattr, file, u32(1), u32(0), z("trusted.x"), []byte("v")), unix.EOPNOTSUPP},
		"capability":        {open(opSetxattr, file, u32(1), u32(0), z("security.capability"), []byte("v")), unix.EOPNOTSUPP},
		"unknown request":   {open(9999, root), unix.ENOSYS},
	} {
		if got := test.do(); got != test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
	if left := unchanged(t, dir); left != "" {
		t.Error(left)
	}
}

// unchanged returns what is wrong with what is beside the shared directory.
func unchanged(t testing.TB, dir string) string {
	t.Helper()
	top := filepath.Dir(dir)
	for _, name := range []string{"secret", "private/secret"} {
		if text, err := os.ReadFile(filepath.Join(top, name)); err != nil || string(text) != "secret" {
			return name + " was changed"
		}
	}
	entries, err := os.ReadDir(top)
	if err != nil || len(entries) != 3 {
		return "something was made outside"
	}
	return ""
}

// What the host moves out of the directory, or puts a link in place of, can't be reached any more.
func TestMovedOut(t *testing.T) {
	t.Parallel()
	dir := outside(t)
	top := filepath.Dir(dir)
	g := newGuest(t, dir, Options{})
	sub, deep, file := g.find("sub"), g.find("sub", "deep"), g.find("file")
	for _, err := range []error{
		os.Rename(filepath.Join(dir, "sub"), filepath.Join(top, "private", "sub")),
		os.WriteFile(filepath.Join(top, "private", "sub", "deep", "x"), nil, 0o644),
		os.Symlink("../private/sub", filepath.Join(dir, "sub")),
		os.Remove(filepath.Join(dir, "file")),
		os.Symlink("../secret", filepath.Join(dir, "file")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, ask := range map[string]func() (*fields, unix.Errno){
		"list":   func() (*fields, unix.Errno) { return g.ask(opOpendir, deep, u32(0), u32(0)) },
		"lookup": func() (*fields, unix.Errno) { return g.ask(opLookup, deep, z("x")) },
		"make":   func() (*fields, unix.Errno) { return g.ask(opMkdir, sub, u32(0o755), u32(0), z("new")) },
		"remove": func() (*fields, unix.Errno) { return g.ask(opUnlink, deep, z("x")) },
		"open":   func() (*fields, unix.Errno) { return g.ask(opOpen, file, u32(0), u32(0)) },
		"mode":   func() (*fields, unix.Errno) { return g.ask(opSetattr, file, u32(setMode), make([]byte, 84)) },
	} {
		if _, errno := ask(); errno != unix.ESTALE {
			t.Errorf("%s: %v, want %v", name, errno, unix.ESTALE)
		}
	}
	if left := unchanged(t, dir); left != "" {
		t.Error(left)
	}
}

// Read-only is the host's to see to.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	dir := outside(t)
	g := newGuest(t, dir, Options{ReadOnly: true})
	file := g.find("file")
	for op, do := range operations {
		if !do.changes {
			continue
		}
		if _, errno := g.ask(op, rootID, z("x")); errno != unix.EROFS {
			t.Errorf("request %d: %v, want %v", op, errno, unix.EROFS)
		}
	}
	for _, flags := range []uint32{unix.O_WRONLY, unix.O_RDWR, unix.O_TRUNC} {
		if _, errno := g.ask(opOpen, file, u32(flags), u32(0)); errno != unix.EROFS {
			t.Errorf("open with %#x: %v, want %v", flags, errno, unix.EROFS)
		}
	}
	if _, errno := g.ask(opOpen, file, u32(0), u32(0)); errno != 0 {
		t.Error(errno)
	}
}

// FuzzRequests sends requests of all kinds, with the nodes and handles that there are.
func FuzzRequests(f *testing.F) {
	for op := range operations {
		f.Add([]byte{byte(op), 1, 8, 'f', 'i', 'l', 'e', 0, 0, 0, 0})
		f.Add([]byte{byte(opLookup), 1, 5, 'f', 'i', 'l', 'e', 0, byte(opOpen), 3, 8, 2, 0, 0, 0, 0, 0, 0, 0, byte(op), 3, 40, 1})
	}
	f.Add([]byte{byte(opBatchForget), 1, 8, 255, 255, 255, 255, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		dir := outside(t)
		g := newGuest(t, dir, Options{})
		go func() { _, _ = io.Copy(io.Discard, g.conn) }()
		for len(script) > 3 {
			op, node, size := opcode(script[0]), uint64(script[1]), int(script[2])
			if op == opFallocate {
				op = opWrite // it takes as much of the disk as there is but for the reserve
			}
			body := make([]byte, size)
			script = script[3+copy(body, script[3:]):]
			g.unique++
			_ = g.conn.SetWriteDeadline(time.Now().Add(time.Minute))
			if _, err := g.conn.Write(message(op, g.unique, node, body)); err != nil {
				t.Fatal(err)
			}
		}
		if left := unchanged(t, dir); left != "" {
			t.Error(left)
		}
	})
}

// What is no request ends the connection, and takes no memory.
func TestNoRequest(t *testing.T) {
	t.Parallel()
	for name, sent := range map[string][]byte{
		"short": u32(requestHeader - 1), "long": u32(maxRequest + 1), "huge": u32(^uint32(0)),
	} {
		g := newGuest(t, outside(t), Options{})
		if _, err := g.conn.Write(append(sent, make([]byte, requestHeader-4)...)); err != nil {
			t.Fatal(err)
		}
		_ = g.conn.SetReadDeadline(time.Now().Add(time.Minute))
		if n, err := g.conn.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // bare
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
}
