package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The authority is in each bundle, once, beside what is there, another one takes its place, and
// none leaves all as it was.
func TestTrust(t *testing.T) {
	t.Parallel()
	const theirs = "-----BEGIN CERTIFICATE-----\ntheirs\n-----END CERTIFICATE-----"
	for _, test := range []struct {
		name   string
		files  map[string]string
		links  map[string]string
		bundle string
	}{
		{"none", nil, nil, "/etc/ssl/certs/ca-certificates.crt"},
		{"Debian", map[string]string{"etc/ssl/certs/ca-certificates.crt": theirs + "\n"}, nil, "/etc/ssl/certs/ca-certificates.crt"},
		{"Alpine", map[string]string{"etc/ssl/certs/ca-certificates.crt": theirs + "\n"},
			map[string]string{"etc/ssl/cert.pem": "certs/ca-certificates.crt"}, "/etc/ssl/certs/ca-certificates.crt"},
		{"Fedora", map[string]string{"etc/pki/ca-trust/extracted/bundle.pem": theirs + "\n", "etc/pki/ca-trust/source/anchors/x": "x"},
			map[string]string{"etc/pki/tls/certs/ca-bundle.crt": "../../ca-trust/extracted/bundle.pem"}, "/etc/pki/tls/certs/ca-bundle.crt"},
		{"SUSE without a last line break", map[string]string{"etc/ssl/ca-bundle.pem": theirs}, nil, "/etc/ssl/ca-bundle.pem"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			to := trust{root: t.TempDir()}
			for name, text := range test.files {
				if err := to.write(name, []byte(text)); err != nil {
					t.Fatal(err)
				}
			}
			for name, target := range test.links {
				if err := os.MkdirAll(filepath.Dir(to.path(name)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.Symlink(target, to.path(name)); err != nil {
					t.Fatal(err)
				}
			}
			for _, authority := range []string{"one\n", "another, longer\n", "third\n"} {
				env, err := to.set([]byte(authority))
				if err != nil || env["SSL_CERT_FILE"] != test.bundle || env["NODE_EXTRA_CA_CERTS"] != "/"+authorityFile {
					t.Fatalf("%v, %v", env, err)
				}
				want := authorityBegin + authority + authorityEnd
				for _, name := range append(bundles(), authorityFile) {
					text, err := os.ReadFile(to.path(name))
					if err != nil {
						continue
					}
					if name == authorityFile && string(text) != authority {
						t.Errorf("%s has %q", name, text)
					}
					if name != authorityFile && (!strings.HasSuffix(string(text), want) || strings.Count(string(text), authorityBegin) != 1 ||
						len(test.files) > 0 && !strings.HasPrefix(string(text), theirs+"\n")) {
						t.Errorf("%s has %q", name, text)
					}
				}
			}
			if env, err := to.set(nil); env != nil || err != nil {
				t.Errorf("without: %v, %v", env, err)
			}
			for name, want := range test.files {
				if text, err := os.ReadFile(to.path(name)); strings.TrimSpace(string(text)) != strings.TrimSpace(want) || err != nil {
					t.Errorf("%s has %q, %v at last", name, text, err)
				}
			}
			for _, name := range append(sources(), authorityFile) {
				if _, err := os.Lstat(to.path(name)); err == nil {
					t.Errorf("%s is there still", name)
				}
			}
		})
	}
}

// A bundle that is no file, too long, or whose marks somebody has broken is left as it is.
func TestTrustOddBundles(t *testing.T) {
	t.Parallel()
	to := trust{root: t.TempDir()}
	if err := os.MkdirAll(to.path("etc/ssl/cert.pem"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := to.write("etc/ssl/ca-bundle.pem", make([]byte, maxBundle+1)); err != nil {
		t.Fatal(err)
	}
	broken := authorityBegin + "no end\n"
	if err := to.write("etc/pki/tls/certs/ca-bundle.crt", []byte(broken)); err != nil {
		t.Fatal(err)
	}
	if _, err := to.set([]byte("ours\n")); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(to.path("etc/ssl/ca-bundle.pem")); err != nil || info.Size() != maxBundle+1 {
		t.Errorf("%v, %v", info, err)
	}
	if text, err := os.ReadFile(to.path("etc/pki/tls/certs/ca-bundle.crt")); err != nil || !strings.HasPrefix(string(text), broken) {
		t.Errorf("%q, %v", text, err)
	}
}
