// Package ociref reads the names of OCI images as docker has them: `python` is
// docker.io/library/python:latest. It does no I/O.
package ociref

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/smolvm/smolvm"
)

const (
	// hub is the registry that a name without one is in, as people write it, and hubServer
	// the name of its server.
	hub       = "docker.io"
	hubServer = name.DefaultRegistry
	// official is the beginning of the repositories of the hub that need no owner.
	official = "library/"
	// maxText is the longest text of a name, in bytes: longer than the longest registry, repository and
	// digest together.
	maxText = 1024
)

// Ref is the name of an image in a registry: by a tag, or pinned by a digest. The zero value
// names none.
type Ref struct {
	// Registry is the registry's host, with its port if it has one: docker.io.
	Registry string
	// Repository is the image's path in the registry: library/python.
	Repository string
	// Tag is the name of one version: latest. Empty if Digest is given.
	Tag string
	// Digest is the digest of a manifest, or of an index of manifests: sha256:…. Empty if
	// the tag decides.
	Digest string
}

// builtinRegistry is the registry of images that are built here and have names of our own. No
// host can have that name, so nothing is ever pulled from it.
const builtinRegistry = "smolvm.invalid"

// Builtin returns the name under which an image with a name of our own is kept. People write
// only its own name.
func Builtin(name string) Ref {
	return Ref{Registry: builtinRegistry, Repository: name, Tag: "latest"}
}

// IsBuiltin reports whether the name is one of our own; see [Builtin].
func (r Ref) IsBuiltin() bool { return r.Registry == builtinRegistry }

// Parse reads a name. What it has not is what docker takes: the registry docker.io, the owner
// library, the tag latest. Of a name with a tag and a digest, the digest decides.
func Parse(text string) (Ref, error) {
	if len(text) > maxText {
		return Ref{}, fmt.Errorf("name of an image: %d bytes are too many", len(text))
	}
	if scheme, rest, found := strings.Cut(text, "://"); found {
		return Ref{}, &smolvm.Error{Err: fmt.Errorf("name %q of an image: it has no %q at its beginning", text, scheme+"://"), Hint: fmt.Sprintf("give %q", rest)}
	}
	parsed, err := name.ParseReference(text, name.WeakValidation)
	if err != nil {
		return Ref{}, explain(text, err)
	}
	repository := parsed.Context()
	if err := check(repository.RegistryStr(), repository.RepositoryStr()); err != nil {
		return Ref{}, explain(text, err)
	}
	ref := Ref{Registry: repository.RegistryStr(), Repository: repository.RepositoryStr()}
	if ref.Registry == hubServer {
		ref.Registry = hub
	}
	switch p := parsed.(type) {
	case name.Digest:
		ref.Digest = p.DigestStr()
	case name.Tag:
		ref.Tag = p.TagStr()
	}
	return ref, nil
}

// check checks what go-containerregistry leaves to registries: that a host is one, and that no
// part of a path leads elsewhere.
func check(host, repository string) error {
	bare := strings.Trim(host, "[]")
	if bare == "" || strings.Contains(host, "..") || !isAlphanumeric(bare[0]) && bare[0] != ':' {
		return fmt.Errorf("%q is no host", host)
	}
	for part := range strings.SplitSeq(repository, "/") {
		if part == "" || !isAlphanumeric(part[0]) || !isAlphanumeric(part[len(part)-1]) {
			return fmt.Errorf("%q is no repository: between slashes, it begins and ends with a letter or digit", repository)
		}
	}
	return nil
}

func isAlphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// explain returns the error of a name that can't be read, with a hint where the fault is a
// common one.
func explain(text string, err error) error {
	err = fmt.Errorf("name %q of an image: %w", text, err)
	if lower := strings.ToLower(text); lower != text {
		if _, again := name.ParseReference(lower, name.WeakValidation); again == nil {
			return &smolvm.Error{Err: err, Hint: "repositories are in lower case"}
		}
	}
	return &smolvm.Error{Err: err, Hint: "names are [REGISTRY/]REPOSITORY[:TAG|@DIGEST], such as python:3.12-slim or ghcr.io/owner/image:1"}
}

// String returns the whole name: docker.io/library/python:latest.
func (r Ref) String() string { return r.Registry + "/" + r.Repository + r.version() }

// Familiar returns the shortest name that means the same: python. That of a built-in one hides a
// registry's.
func (r Ref) Familiar() string {
	text := r.Repository
	switch r.Registry {
	case hub:
		text = strings.TrimPrefix(text, official)
	case builtinRegistry:
	default:
		text = r.Registry + "/" + text
	}
	if r.Digest == "" && r.Tag == name.DefaultTag {
		return text
	}
	return text + r.version()
}

// version returns the tag or the digest, with what separates it from the repository.
func (r Ref) version() string {
	if r.Digest != "" {
		return "@" + r.Digest
	}
	return ":" + r.Tag
}

// Pinned reports whether the name means the same image for ever.
func (r Ref) Pinned() bool { return r.Digest != "" }

// Pin returns the name of that very image: with the digest in place of the tag.
func (r Ref) Pin(digest string) Ref {
	r.Tag, r.Digest = "", digest
	return r
}

// Server returns the registry as package name of go-containerregistry has it.
func (r Ref) Server() (name.Registry, error) {
	registry, err := name.NewRegistry(r.Registry)
	if err != nil {
		return name.Registry{}, fmt.Errorf("registry of image %s: %w", r, err)
	}
	return registry, nil
}

// Meaning is what a name means where images have names of their own too.
type Meaning struct {
	// Builtin is the name of an image of our own; empty if the name means one of a registry.
	Builtin string
	// Ref is the registry's image that is meant. If Builtin is given, it is the one that the
	// built-in name hides, and the zero value if it hides none.
	Ref Ref
}

// errNoName reports that there is no name.
var errNoName = errors.New("an image has a name")

// Resolve returns what a name means, where those of builtin are names of our own. Such a name
// wins over the registry's image of the same name, which its whole name reaches:
// docker.io/library/python. A name with a registry, an owner, a tag or a digest is never ours.
func Resolve(text string, builtin []string) (Meaning, error) {
	if text == "" {
		return Meaning{}, errNoName
	}
	ref, err := Parse(text)
	if slices.Contains(builtin, text) {
		if err != nil {
			ref = Ref{} // no registry has an image of that name
		}
		return Meaning{Builtin: text, Ref: ref}, nil
	}
	return Meaning{Ref: ref}, err
}
