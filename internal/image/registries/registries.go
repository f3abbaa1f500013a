// Package registries finds out where images are fetched from, by the configuration of podman and
// its relatives: registries.conf, version 2 (containers-registries.conf(5)). It is the only one
// that is a standard, knows mirrors of any registry, and is there already where a site has some.
package registries

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/smolvm/smolvm/internal/image/ociref"
)

// Config is what the files say. The zero value has each image in its own registry.
type Config struct{ registries []registry }

// registry is a table [[registry]].
type registry struct {
	// Prefix is the beginning of names that it is for; *.example.com is for all hosts below.
	Prefix string `toml:"prefix"`
	// Location takes the place of the prefix. Empty: the prefix stays.
	Location string   `toml:"location"`
	Blocked  bool     `toml:"blocked"`
	Mirrors  []mirror `toml:"mirror"`
	// DigestOnly has mirrors asked for pinned names only.
	DigestOnly bool `toml:"mirror-by-digest-only"`
}

// mirror is a table [[registry.mirror]].
type mirror struct {
	Location string `toml:"location"`
	// Pull says for which names it is asked: all, digest-only or tag-only.
	Pull string `toml:"pull-from-mirror"`
}

// maxFile is the longest file that is read, in bytes.
const maxFile = 1 << 20

// Load reads the files that are there: the one that $CONTAINERS_REGISTRIES_CONF names, else that
// of the user, else that of the host; and then those in registries.conf.d of the host and of
// the user, whose tables take the place of others with the same prefix.
func Load() (Config, error) {
	own := os.Getenv("XDG_CONFIG_HOME")
	if home, err := os.UserHomeDir(); own == "" && err == nil {
		own = filepath.Join(home, ".config")
	}
	dirs := []string{"/etc/containers"}
	if own != "" {
		dirs = append(dirs, filepath.Join(own, "containers"))
	}
	return load(os.Getenv("CONTAINERS_REGISTRIES_CONF"), dirs)
}

// load is Load of a file, unless that is empty, and of directories, the least important first.
func load(file string, dirs []string) (Config, error) {
	var config Config
	if file != "" {
		return config, config.add(file)
	}
	for _, dir := range slices.Backward(dirs) {
		err := config.add(filepath.Join(dir, "registries.conf"))
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return Config{}, err
		}
	}
	for _, dir := range dirs {
		entries, err := os.ReadDir(filepath.Join(dir, "registries.conf.d"))
		if err != nil {
			continue
		}
		for _, entry := range entries {
			if !strings.HasSuffix(entry.Name(), ".conf") {
				continue
			}
			if err := config.add(filepath.Join(dir, "registries.conf.d", entry.Name())); err != nil {
				return Config{}, err
			}
		}
	}
	return config, nil
}

// add adds what a file says.
func (c *Config) add(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read mirrors of registries: %w", err)
	}
	defer func() { _ = file.Close() }()
	var content struct {
		Registries []registry `toml:"registry"`
	}
	if _, err := toml.NewDecoder(io.LimitReader(file, maxFile)).Decode(&content); err != nil {
		return fmt.Errorf("read mirrors of registries: %s: %w", path, err)
	}
	for _, one := range content.Registries {
		one.Prefix = strings.TrimSuffix(cmp.Or(one.Prefix, one.Location), "/")
		if one.Prefix == "" {
			return fmt.Errorf("read mirrors of registries: %s: a registry has neither prefix nor location", path)
		}
		c.registries = slices.DeleteFunc(c.registries, func(r registry) bool { return r.Prefix == one.Prefix })
		c.registries = append(c.registries, one)
	}
	return nil
}

// ErrBlocked reports that a configuration forbids a registry.
var ErrBlocked = errors.New("its registry is blocked by registries.conf")

// Sources returns where an image is to be fetched from, one after the other: its mirrors, and
// its registry. The error matches [ErrBlocked].
func (c Config) Sources(ref ociref.Ref) ([]ociref.Ref, error) {
	name := ref.Registry + "/" + ref.Repository
	var found *registry
	rest := ""
	for i, r := range c.registries {
		if after, ok := match(r.Prefix, name); ok && (found == nil || len(r.Prefix) > len(found.Prefix)) {
			found, rest = &c.registries[i], after
		}
	}
	switch {
	case found == nil:
		return []ociref.Ref{ref}, nil
	case found.Blocked:
		return nil, fmt.Errorf("image %s: %w", ref, ErrBlocked)
	}
	var sources []ociref.Ref
	for _, m := range found.Mirrors {
		if !m.serves(ref, found.DigestOnly) {
			continue
		}
		source, err := at(ref, m.Location+rest)
		if err != nil {
			return nil, err
		}
		sources = append(sources, source)
	}
	if found.Location == "" || strings.HasPrefix(found.Prefix, "*.") {
		return append(sources, ref), nil
	}
	source, err := at(ref, strings.TrimSuffix(found.Location, "/")+rest)
	return append(sources, source), err
}

// match returns what of a name comes after a prefix.
func match(prefix, name string) (rest string, ok bool) {
	if domain, wild := strings.CutPrefix(prefix, "*"); wild {
		host, path, _ := strings.Cut(name, "/")
		return "/" + path, strings.HasSuffix(host, domain)
	}
	rest, ok = strings.CutPrefix(name, prefix)
	return rest, ok && (rest == "" || rest[0] == '/')
}

func (m mirror) serves(ref ociref.Ref, digestOnly bool) bool {
	switch cmp.Or(m.Pull, "all") {
	case "digest-only":
		return ref.Pinned()
	case "tag-only":
		return !ref.Pinned()
	}
	return ref.Pinned() || !digestOnly
}

// at returns an image at another place.
func at(ref ociref.Ref, place string) (ociref.Ref, error) {
	host, repository, _ := strings.Cut(place, "/")
	if host == "" || repository == "" {
		return ociref.Ref{}, fmt.Errorf("image %s: registries.conf has it at %q, which is no place for an image", ref, place)
	}
	// The host is one even without a dot in it, which a name by itself would not tell.
	text := repository + ":" + ref.Tag
	if ref.Pinned() {
		text = repository + "@" + ref.Digest
	}
	parsed, err := ociref.Parse("x.invalid/" + text)
	if err != nil {
		return ociref.Ref{}, fmt.Errorf("image %s at %q, where registries.conf has it: %w", ref, place, err)
	}
	parsed.Registry = host
	return parsed, nil
}
