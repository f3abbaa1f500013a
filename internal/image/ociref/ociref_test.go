package ociref

import (
	"errors"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
)

const someDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestParse(t *testing.T) {
	for _, test := range []struct{ text, whole, familiar string }{
		{"python", "docker.io/library/python:latest", "python"},
		{"python:3.12-slim", "docker.io/library/python:3.12-slim", "python:3.12-slim"},
		{"library/python", "docker.io/library/python:latest", "python"},
		{"docker.io/python", "docker.io/library/python:latest", "python"},
		{"docker.io/library/python:latest", "docker.io/library/python:latest", "python"},
		{"index.docker.io/library/python", "docker.io/library/python:latest", "python"},
		{"owner/image", "docker.io/owner/image:latest", "owner/image"},
		{"ghcr.io/owner/image:1", "ghcr.io/owner/image:1", "ghcr.io/owner/image:1"},
		{"ghcr.io/image", "ghcr.io/image:latest", "ghcr.io/image"},
		{"localhost/image", "localhost/image:latest", "localhost/image"},
		{"localhost:5000/a/b/c:v", "localhost:5000/a/b/c:v", "localhost:5000/a/b/c:v"},
		{"127.0.0.1:5000/image", "127.0.0.1:5000/image:latest", "127.0.0.1:5000/image"},
		{"[::1]:5000/image", "[::1]:5000/image:latest", "[::1]:5000/image"},
		{"host:5000/image:1", "host:5000/image:1", "host:5000/image:1"},
		{"python@" + someDigest, "docker.io/library/python@" + someDigest, "python@" + someDigest},
		{"python:3@" + someDigest, "docker.io/library/python@" + someDigest, "python@" + someDigest},
	} {
		ref, err := Parse(test.text)
		if err != nil {
			t.Errorf("%q: %v", test.text, err)
			continue
		}
		if ref.String() != test.whole || ref.Familiar() != test.familiar {
			t.Errorf("%q is %q (%q), want %q (%q)", test.text, ref, ref.Familiar(), test.whole, test.familiar)
		}
		if ref.Pinned() != strings.Contains(test.text, "@") {
			t.Errorf("%q pinned: %v", test.text, ref.Pinned())
		}
		for _, again := range []string{ref.String(), ref.Familiar()} {
			if back, err := Parse(again); err != nil || back != ref {
				t.Errorf("%q means %v (%v), want %v", again, back, err, ref)
			}
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, test := range []struct{ text, want, hint string }{
		{"", "name", "REGISTRY"},
		{"Python", "name", "lower case"},
		{"python:", "", ""},
		{"python@sha256:abc", "name", ""},
		{"python@md5:d41d8cd98f00b204e9800998ecf8427e", "name", ""},
		{"../etc/passwd", "no host", ""},
		{"ghcr.io/a/../b", "no repository", ""},
		{"ghcr.io/a//b", "no repository", ""},
		{"-x.io/b", "", ""},
		{"a/-b", "no repository", ""},
		{"a b", "name", ""},
		{"docker://python", "no \"docker://\"", `give "python"`},
		{"https://ghcr.io/x", "no \"https://\"", `give "ghcr.io/x"`},
		{strings.Repeat("a", 3000), "too many", ""},
		{strings.Repeat("a", 300), "name", ""},
		{"py\x1b[31mthon", "name", ""},
		{"python:" + strings.Repeat("t", 129), "name", ""},
	} {
		ref, err := Parse(test.text)
		if err == nil {
			// What is let through must at least name no path and no other place.
			if strings.Contains(ref.String(), "..") || strings.ContainsAny(ref.String(), " \x1b") {
				t.Errorf("%q is %q", test.text, ref)
			}
			if test.want != "" {
				t.Errorf("%q is %q, want an error", test.text, ref)
			}
			continue
		}
		if !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: %v, want %q", test.text, err, test.want)
		}
		var hinted *smolvm.Error
		if test.hint != "" && (!errors.As(err, &hinted) || !strings.Contains(hinted.Hint, test.hint)) {
			t.Errorf("%q: %v has no hint %q", test.text, err, test.hint)
		}
	}
}

func TestResolve(t *testing.T) {
	ours := []string{"base", "python", "x_-.9"}
	for _, test := range []struct{ text, builtin, ref string }{
		{"base", "base", "docker.io/library/base:latest"},
		{"python", "python", "docker.io/library/python:latest"},
		{"python:latest", "", "docker.io/library/python:latest"},
		{"docker.io/library/python", "", "docker.io/library/python:latest"},
		{"node", "", "docker.io/library/node:latest"},
	} {
		got, err := Resolve(test.text, ours)
		if err != nil || got.Builtin != test.builtin || got.Ref.String() != test.ref {
			t.Errorf("%q means %+v (%v), want %q, %q", test.text, got, err, test.builtin, test.ref)
		}
	}
	if _, err := Resolve("", ours); err == nil {
		t.Error("an empty name means something")
	}
	if _, err := Resolve("No Name", ours); err == nil {
		t.Error("a name with a blank means something")
	}
}

func TestPin(t *testing.T) {
	ref, err := Parse("ghcr.io/a/b:1")
	if err != nil {
		t.Fatal(err)
	}
	if got := ref.Pin(someDigest).String(); got != "ghcr.io/a/b@"+someDigest {
		t.Error(got)
	}
	server, err := ref.Server()
	if err != nil || server.Name() != "ghcr.io" {
		t.Error(server, err)
	}
}

// A name of our own is written as it is, and is none of a registry that there is.
func TestBuiltin(t *testing.T) {
	t.Parallel()
	ref := Builtin("python")
	again, err := Parse(ref.String())
	if err != nil || again != ref || !again.IsBuiltin() || ref.Familiar() != "python" {
		t.Errorf("%s reads as %s (%v), and is written %s", ref, again, err, ref.Familiar())
	}
	if registry, err := Parse("python"); err != nil || registry == ref || registry.IsBuiltin() {
		t.Errorf("the registry's is %s, %v", registry, err)
	}
}
