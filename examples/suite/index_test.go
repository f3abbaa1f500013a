package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// romanModule is what the package roman does, as far as the example uses it.
const romanModule = `def toRoman(n):
    text = ""
    for value, sign in ((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")):
        while n >= value:
            text, n = text + sign, n - value
    return text
`

// writeWheel makes a directory of an index with a wheel of the package roman.
func writeWheel(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(filepath.Join(dir, "roman-5.0-py3-none-any.whl"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	const info = "roman-5.0.dist-info/"
	files := []struct{ name, content string }{
		{"roman.py", romanModule},
		{info + "METADATA", "Metadata-Version: 2.1\nName: roman\nVersion: 5.0\n"},
		{info + "WHEEL", "Wheel-Version: 1.0\nGenerator: smolvm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"},
		{info + "RECORD", ""},
	}
	archive := zip.NewWriter(file)
	var record strings.Builder
	for _, f := range files {
		if f.content == "" {
			f.content = record.String() + f.name + ",,\n"
		}
		w, err := archive.Create(f.name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(f.content)); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte(f.content))
		fmt.Fprintf(&record, "%s,sha256=%s,%d\n", f.name, base64.RawURLEncoding.EncodeToString(sum[:]), len(f.content))
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
}

// padPackage and padModule are the package left-pad, as far as the example uses it.
const (
	padPackage = `{"name": "left-pad", "version": "1.3.0", "main": "index.js"}`
	padModule  = "module.exports = (text, width) => text.padStart(width);\n"
)

// tarball returns the package left-pad as registries have it.
func tarball(t *testing.T) []byte {
	t.Helper()
	var packed bytes.Buffer
	zipped := gzip.NewWriter(&packed)
	archive := tar.NewWriter(zipped)
	for name, content := range map[string]string{"package/package.json": padPackage, "package/index.js": padModule} {
		if err := archive.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := archive.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
	if err := zipped.Close(); err != nil {
		t.Fatal(err)
	}
	return packed.Bytes()
}

// handler serves a directory with an index of Python's, and a registry of Node's with one package.
func (i *index) handler(dir string, pad []byte) http.Handler {
	mux := http.NewServeMux()
	files := http.FileServer(http.Dir(dir))
	mux.HandleFunc("/simple/", func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, ".whl") {
			i.fetched.Add(1)
		}
		files.ServeHTTP(w, r)
	})
	mux.HandleFunc("/npm/left-pad", func(w http.ResponseWriter, _ *http.Request) {
		sum := sha512.Sum512(pad)
		version := map[string]any{
			"name": "left-pad", "version": "1.3.0",
			"dist": map[string]string{
				"tarball":   i.url.JoinPath("npm", "left-pad", "-", "left-pad-1.3.0.tgz").String(),
				"integrity": "sha512-" + base64.StdEncoding.EncodeToString(sum[:]),
			},
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{
			"name": "left-pad", "dist-tags": map[string]string{"latest": "1.3.0"}, "versions": map[string]any{"1.3.0": version},
		})
	})
	mux.HandleFunc("/npm/left-pad/-/left-pad-1.3.0.tgz", func(w http.ResponseWriter, _ *http.Request) {
		i.fetched.Add(1)
		_, _ = w.Write(pad)
	})
	return mux
}
