package manager_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/workspace"
	"github.com/smolvm/smolvm/manager"
)

// openWorkspace opens a workspace of the default image.
func openWorkspace(t *testing.T, m *manager.Manager, opts workspace.Options) *workspace.Workspace {
	t.Helper()
	image, err := m.Image(t.Context(), smolvm.DefaultImage)
	if err != nil {
		t.Fatal(err)
	}
	w, err := m.OpenWorkspace(t.Context(), image, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(context.Background()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return w
}

// inWorkspace runs a line of a shell, and returns what it wrote.
func inWorkspace(t *testing.T, w *workspace.Workspace, line string, change ...func(*workspace.Command)) string {
	t.Helper()
	var out bytes.Buffer
	command := workspace.Command{Args: []string{"sh", "-ec", line}, Stdout: &out, Stderr: &out}
	for _, c := range change {
		c(&command)
	}
	status, err := w.Run(t.Context(), command)
	if err != nil || !status.Success() {
		t.Fatalf("%s: %s, %v\n%s", line, status, err, out.String())
	}
	return out.String()
}

// layerOf takes a layer, and returns a line for each of its entries.
func layerOf(t *testing.T, w *workspace.Workspace) []string {
	t.Helper()
	var archive bytes.Buffer
	if err := w.Layer(t.Context(), &archive); err != nil {
		t.Fatal(err)
	}
	var entries []string
	for r := tar.NewReader(&archive); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return entries
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		line := fmt.Sprintf("%c %s %o %d:%d", header.Typeflag, header.Name, header.Mode, header.Uid, header.Gid)
		if header.Linkname != "" {
			line += " -> " + header.Linkname
		}
		if len(content) > 0 {
			line += " = " + strings.TrimSpace(string(content))
		}
		for _, name := range slices.Sorted(maps.Keys(header.PAXRecords)) {
			if strings.HasPrefix(name, "SCHILY.xattr.") {
				line += fmt.Sprintf(" %s", name)
			}
		}
		entries = append(entries, line)
	}
}

// checkLayer takes a layer, and compares it with the lines that layerOf has of it.
func checkLayer(t *testing.T, w *workspace.Workspace, name string, want ...string) {
	t.Helper()
	if got := layerOf(t, w); !slices.Equal(got, want) {
		t.Errorf("layer %q is\n%s\nwant\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// Commands run one after the other in a workspace, and what each changed is a layer.
func TestWorkspace(t *testing.T) {
	t.Parallel()
	m := openFast(t)
	var reports []smolvm.StartReport
	started := workspace.Options{Started: func(r smolvm.StartReport) { reports = append(reports, r) }}
	w := openWorkspace(t, m, started)
	checkLayer(t, w, "of nothing")
	inWorkspace(t, w, `mkdir /srv; mkdir -m 2750 /srv/data; cd /srv/data; echo one > a; chown 7:8 a; chmod 4711 a; ln a b; ln -s a c; mknod d c 1 3
		rm /bin/ls; sleep 1000 & echo out > /dev/null; test $$ = 1`)
	checkLayer(t, w, "first",
		"5 bin/ 755 0:0", "0 bin/.wh.ls 644 0:0",
		"5 srv/ 755 0:0", "5 srv/data/ 2750 0:0", "0 srv/data/a 4711 7:8 = one", "1 srv/data/b 4711 7:8 -> srv/data/a",
		"2 srv/data/c 777 0:0 -> a", "3 srv/data/d 644 0:0")
	checkLayer(t, w, "of nothing more")
	// What was left behind has ended, and a later step sees what earlier ones have done.
	if out := inWorkspace(t, w, `! test -e /bin/ls; cat /srv/data/b; ps | grep -c "[s]leep" || true`); out != "one\n0\n" {
		t.Errorf("the second step sees %q", out)
	}
	inWorkspace(t, w, `rm -r /srv/data; mkdir /srv/data; touch /srv/data/new; echo changed > /etc/hosts; mkdir -p /run/app`)
	checkLayer(t, w, "second", "5 run/ 755 0:0", "5 run/app/ 755 0:0",
		"5 srv/ 755 0:0", "5 srv/data/ 755 0:0", "0 srv/data/.wh..wh..opq 644 0:0", "0 srv/data/new 644 0:0")

	t.Run("put", func(t *testing.T) { putIntoWorkspace(t, w) })
	t.Run("discarded", func(t *testing.T) { discardLayer(t, w) })
	t.Run("as docker has it", func(t *testing.T) { stepsAsDocker(t, w) })
	t.Run("mounts", func(t *testing.T) { mountInWorkspace(t, w) })
	awaitTemplates(t, m)
	second := openWorkspace(t, m, started)
	if out := inWorkspace(t, second, "cat /etc/passwd | head -n 1 | cut -d: -f1"); out != "root\n" {
		t.Errorf("a second workspace says %q", out)
	}
	if len(reports) != 2 || reports[1].Method != smolvm.StartClone {
		t.Errorf("the second workspace was started by %+v", reports)
	}
}

// putIntoWorkspace checks that an archive is part of the next layer.
func putIntoWorkspace(t *testing.T, w *workspace.Workspace) {
	t.Helper()
	archive := tarOf(t,
		&tar.Header{Typeflag: tar.TypeReg, Name: "sub/f", Mode: 0o4755, Uid: 3, Gid: 4, Size: 3, ModTime: time.Unix(1e9, 0), PAXRecords: capable()},
		&tar.Header{Typeflag: tar.TypeReg, Name: "data/.wh.new"})
	if err := w.Put(t.Context(), "/srv", archive); err != nil {
		t.Fatal(err)
	}
	if out := inWorkspace(t, w, "stat -c '%a %u %g %Y' /srv/sub/f; test ! -e /srv/data/new"); out != "4755 3 4 1000000000\n" {
		t.Errorf("it is %q", out)
	}
	checkLayer(t, w, "put", "5 srv/ 755 0:0", "5 srv/data/ 755 0:0", "0 srv/data/.wh.new 644 0:0",
		"5 srv/sub/ 755 0:0", "0 srv/sub/f 4755 3:4 = xxx SCHILY.xattr.security.capability")
}

// discardLayer checks that what a discarded layer has is below the next one.
func discardLayer(t *testing.T, w *workspace.Workspace) {
	t.Helper()
	inWorkspace(t, w, "echo below > /srv/below")
	if err := w.Layer(t.Context(), io.Discard); err != nil {
		t.Fatal(err)
	}
	inWorkspace(t, w, "cat /srv/below")
	checkLayer(t, w, "after what was discarded")
}

// stepsAsDocker checks what a step is told, and of what it has failed.
func stepsAsDocker(t *testing.T, w *workspace.Workspace) {
	t.Helper()
	out := inWorkspace(t, w, `id -u; pwd; echo $HOME $A; cat /proc/1/comm; ip -o link | grep -c eth0 || true; cat /etc/resolv.conf | head -c 10`, func(c *workspace.Command) {
		c.User, c.Dir, c.Env = "1000", "/tmp", []string{"A=b c"}
	})
	if want := "1000\n/tmp\n/home/user b c\nsh\n1\nnameserver"; out != want {
		t.Errorf("a step is told %q, want %q", out, want)
	}
	out = inWorkspace(t, w, "ip -o link | wc -l; ping -c 1 127.0.0.1 > /dev/null", func(c *workspace.Command) { c.NoNetwork = true })
	if out != "1\n" {
		t.Errorf("without a network there are %s interfaces", out)
	}
	// More than fits into the request, and bytes that are no text.
	long := strings.Repeat("x", 100_000)
	out = inWorkspace(t, w, `cat; echo ${#A} ${#B} "$C"`, func(c *workspace.Command) {
		c.Stdin, c.Env = strings.NewReader("read\n"), []string{"A=" + long, "B=" + long, "C=\xff\xfe"}
	})
	if out != "read\n100000 100000 \xff\xfe\n" {
		t.Errorf("it is told %.100q", out)
	}
	status, err := w.Run(t.Context(), workspace.Command{Args: []string{"no-such-command"}})
	if err != nil || status.Code != 127 {
		t.Errorf("a missing command: %s, %v", status, err)
	}
}

// mountInWorkspace checks what only one step sees.
func mountInWorkspace(t *testing.T, w *workspace.Workspace) {
	t.Helper()
	if err := w.PutArea(t.Context(), "secret", true, tarOf(t, &tar.Header{Name: "key", Mode: 0o400, Size: 3})); err != nil {
		t.Fatal(err)
	}
	if err := w.PutArea(t.Context(), "cache", false, tarOf(t)); err != nil {
		t.Fatal(err)
	}
	out := inWorkspace(t, w, `cat /run/secrets/key; echo more > /root/.cache/deep/kept; ! (echo x > /run/secrets/key) 2> /dev/null; df -t tmpfs /scratch > /dev/null`, func(c *workspace.Command) {
		c.Mounts = []workspace.Mount{
			{Area: "secret", Source: "key", Target: "/run/secrets/key", ReadOnly: true},
			{Area: "cache", Target: "/root/.cache/deep"}, {Target: "/scratch", Size: 1 << 20},
		}
	})
	if !strings.HasPrefix(out, "xxx") {
		t.Errorf("the secret is %q", out)
	}
	var area bytes.Buffer
	if err := w.Area(t.Context(), "cache", &area); err != nil || !bytes.Contains(area.Bytes(), []byte("more")) {
		t.Errorf("the area has %q, %v", area.Bytes(), err)
	}
	for _, entry := range layerOf(t, w) {
		if strings.Contains(entry, "key") || strings.Contains(entry, "deep") || strings.Contains(entry, "scratch") {
			t.Errorf("the layer has %s", entry)
		}
	}
	if err := w.DropArea(t.Context(), "secret"); err != nil {
		t.Error(err)
	}
}

// capable is what an archive says of a file that has a capability: cap_net_raw=ep.
func capable() map[string]string {
	return map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00" + strings.Repeat("\x00", 12)}
}

// tarOf returns an archive. All its files have x as content.
func tarOf(t *testing.T, headers ...*tar.Header) io.Reader {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, header := range headers {
		if err := w.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, strings.Repeat("x", int(header.Size))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &archive
}
