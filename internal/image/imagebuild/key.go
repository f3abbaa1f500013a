package imagebuild

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/ocistore"
)

// keyVersion changes whenever the same key leads to another layer.
const keyVersion = 1

// stepKey is what a step's layer depends on.
type stepKey struct {
	Version int
	Arch    string
	Epoch   int64
	// Parent is the chain of the layers below.
	Parent string
	Run    *runKey           `json:",omitempty"`
	Copy   *copyKey          `json:",omitempty"`
	Mkdir  *dockerfile.Mkdir `json:",omitempty"`
}

// runKey is what a command's result depends on: not on proxies, the values of secrets and what is
// in caches.
type runKey struct {
	Args, Env []string
	Dir, User string
	NoNetwork bool
	Mounts    []mountKey
}

type mountKey struct {
	dockerfile.Mount
	From string // the content of what is mounted
}

// copyKey is what a copy's result depends on.
type copyKey struct {
	// From is the chain of the source's layers, and Paths what is copied of it; or Content is
	// what is copied.
	From    string
	Paths   []string
	Content string

	Files       []dockerfile.File
	Dest        string
	Owner, Mode string
	Exclude     []string
	Unpack      bool
}

// keyOf returns the key of a step.
func (s *stage) keyOf(key stepKey) (string, error) {
	key.Version, key.Arch, key.Parent = keyVersion, s.opts.Arch, chainOf(s.layers)
	if s.opts.Epoch != nil && key.Run == nil {
		key.Epoch = s.opts.Epoch.Unix() // which is in the layer
	}
	text, err := json.Marshal(key)
	if err != nil {
		return "", err
	}
	return digestOf(text), nil
}

func digestOf(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// chainOf names what layers make together, one on top of the other: as the image specification's
// chain id does.
func chainOf(layers []ocistore.Layer) string {
	chain := ""
	for _, layer := range layers {
		chain = digestOf([]byte(chain + " " + layer.DiffID))
	}
	return chain
}

// keyMakers returns what makes the keys of a step, the cheapest first: each leads to the same
// layer.
func (s *stage) keyMakers(ctx context.Context, op dockerfile.Op) ([]func() (string, error), error) {
	switch op := op.(type) {
	case *dockerfile.Mkdir:
		return []func() (string, error){func() (string, error) { return s.keyOf(stepKey{Mkdir: op}) }}, nil
	case *dockerfile.Run:
		return []func() (string, error){func() (string, error) { return s.runKey(ctx, op) }}, nil
	case *dockerfile.Copy:
		byContent := func() (string, error) { return s.copyKey(ctx, op, true) }
		if op.From == (dockerfile.Source{}) {
			return []func() (string, error){byContent}, nil
		}
		// Of layers that were there before nothing needs to be read.
		return []func() (string, error){func() (string, error) { return s.copyKey(ctx, op, false) }, byContent}, nil
	}
	return nil, fmt.Errorf("a step is a %T", op)
}

func (s *stage) runKey(ctx context.Context, op *dockerfile.Run) (string, error) {
	key := runKey{Args: op.Args, Env: slices.Sorted(slices.Values(op.Env)), Dir: op.Dir, User: op.User, NoNetwork: op.NoNetwork}
	for _, mount := range op.Mounts {
		mounted := mountKey{Mount: mount}
		if mount.Type == dockerfile.MountBind {
			var err error
			if mounted.From, err = s.contentOf(ctx, mount.From, mount.Path); err != nil {
				return "", fmt.Errorf("--mount of %q: %w", mount.Path, err)
			}
		}
		mounted.Mount.From = dockerfile.Source{}
		key.Mounts = append(key.Mounts, mounted)
	}
	return s.keyOf(stepKey{Run: &key})
}

// contentOf names the content of a file or directory with all that is in it.
func (s *stage) contentOf(ctx context.Context, from dockerfile.Source, name string) (string, error) {
	tree, err := s.source(ctx, from)
	if err != nil {
		return "", err
	}
	selected, err := s.selectFiles(ctx, tree, []string{name}, nil)
	if err != nil {
		return "", err
	}
	return hashSelections(ctx, selected)
}

func (s *stage) copyKey(ctx context.Context, op *dockerfile.Copy, content bool) (string, error) {
	key := copyKey{Files: op.Files, Dest: op.Dest, Owner: op.Owner, Mode: op.Mode, Exclude: op.Exclude, Unpack: op.Unpack}
	if !content {
		layers, err := s.layersOf(ctx, op.From)
		if err != nil {
			return "", err
		}
		key.From, key.Paths = "layers "+chainOf(layers), op.Paths
		return s.keyOf(stepKey{Copy: &key})
	}
	tree, err := s.source(ctx, op.From)
	if err != nil {
		return "", err
	}
	selected, err := s.selectFiles(ctx, tree, op.Paths, op.Exclude)
	if err != nil {
		return "", err
	}
	if key.Content, err = hashSelections(ctx, selected); err != nil {
		return "", err
	}
	s.selected = selected
	return s.keyOf(stepKey{Copy: &key})
}

// hashSelections names what is copied, but for its times.
func hashSelections(ctx context.Context, selected []selection) (string, error) {
	sum := sha256.New()
	line := func(parts ...any) error { return json.NewEncoder(sum).Encode(parts) }
	ids := map[any]int{} // of files that have several names
	for _, one := range selected {
		if err := line("source", one.base, len(one.items)); err != nil {
			return "", err
		}
		for i, item := range one.items {
			if ctx.Err() != nil {
				return "", context.Cause(ctx)
			}
			f := item.file
			first, again := ids[f.ID]
			switch again = again && f.ID != nil && !f.IsDir(); {
			case again:
			case f.ID != nil:
				first, ids[f.ID] = len(ids), len(ids)
			}
			// Names are bytes, of which JSON would make text.
			err := line([]byte(item.name), f.Mode, f.UID, f.GID, f.Size, []byte(f.Link), f.Device, f.Xattrs, again, first)
			if err == nil && f.IsRegular() && !again {
				one.items[i].sum, err = hashContent(item)
				sum.Write(one.items[i].sum)
			}
			if err != nil {
				return "", err
			}
		}
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// hashContent returns the hash of a file's content.
func hashContent(item item) ([]byte, error) {
	content, err := item.open()
	if err != nil {
		return nil, err
	}
	defer func() { _ = content.Close() }()
	sum := sha256.New()
	if _, err := io.Copy(sum, io.LimitReader(content, item.file.Size)); err != nil {
		return nil, fmt.Errorf("%q: %w", item.name, err)
	}
	return sum.Sum(nil), nil
}
