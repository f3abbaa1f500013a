package debtest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Mirror is a mirror of a distribution of the test's.
type Mirror struct {
	URL string
	// Files are what it serves, by their path, and Changed is when they were changed. They are
	// changed by Edit, as they may be being served.
	Files   map[string][]byte
	Changed time.Time
	// Cut is how many answers with packages are cut off in their middle, and Resumed how many
	// requests went on where such an answer ended.
	Cut, Resumed atomic.Int32

	mu sync.Mutex // held while Files and Changed are changed, or read to be served
}

// Edit changes what it serves.
func (m *Mirror) Edit(change func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change()
}

func (m *Mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	content, ok := m.Files[strings.TrimPrefix(r.URL.Path, "/")]
	changed := m.Changed
	m.mu.Unlock()
	if !ok {
		http.NotFound(w, r)
		return
	}
	if strings.HasSuffix(r.URL.Path, ".deb") {
		if r.Header.Get("Range") != "" {
			m.Resumed.Add(1)
		} else if m.Cut.Add(-1) >= 0 {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			_, _ = w.Write(content[:len(content)/2])
			panic(http.ErrAbortHandler)
		}
	}
	http.ServeContent(w, r, "", changed, bytes.NewReader(content))
}

// Deb is a package as a mirror has it.
type Deb struct {
	Name, Control string
	Content       []byte
}

// Deb returns the package as a mirror has it.
func (p Package) Deb(tb testing.TB) Deb {
	tb.Helper()
	control := p.Control
	if control == "" {
		control = Control(p.Name, "")
	}
	return Deb{Name: p.Name, Control: control, Content: p.Bytes(tb)}
}

// NewMirror serves packages of release test of Debian, and has the apt of this test use it instead of
// the host's mirrors. What sources.list has before the URI is options.
func NewMirror(t *testing.T, options string, packages ...Deb) *Mirror {
	t.Helper()
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("apt-get is not on this host")
	}
	m := &Mirror{Files: map[string][]byte{}, Changed: time.Unix(1_600_000_000, 0)}
	var list strings.Builder
	for _, p := range packages {
		name := "pool/" + p.Name + ".deb"
		m.Files[name] = p.Content
		fmt.Fprintf(&list, "%sFilename: %s\nSize: %d\nSHA256: %x\n\n", p.Control, name, len(p.Content), sha256.Sum256(p.Content))
	}
	index := "main/binary-" + runtime.GOARCH + "/Packages"
	m.Files["dists/test/"+index] = []byte(list.String())
	m.Files["dists/test/Release"] = fmt.Appendf(nil, "Origin: Debian\nCodename: test\nSuite: test\nArchitectures: %s\nComponents: main\n"+
		"Date: Sat, 01 Jan 2022 00:00:00 UTC\nSHA256:\n %x %d %s\n", runtime.GOARCH, sha256.Sum256([]byte(list.String())), list.Len(), index)
	server := httptest.NewServer(m)
	t.Cleanup(server.Close)
	m.URL = server.URL
	ConfigureAPT(t, fmt.Sprintf("deb %s %s test main\n", options, server.URL))
	return m
}

// ConfigureAPT has the apt of this test use other sources than the host's.
func ConfigureAPT(t *testing.T, sources string) {
	t.Helper()
	etc := t.TempDir()
	config := fmt.Sprintf("Dir::Etc %q;\nAcquire::http::Proxy \"DIRECT\";\nAcquire::Retries::Delay \"false\";\nAcquire::Check-Date \"false\";\n", etc)
	for name, text := range map[string]string{"apt.conf": config, "sources.list": sources} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("APT_CONFIG", filepath.Join(etc, "apt.conf"))
}
