package distro

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/deb"
	"github.com/smolvm/smolvm/internal/image/ociconfig"
)

// Recipe says what an image of the distribution's packages is made of. A file of one is YAML
// with the keys that the tags name.
type Recipe struct {
	// Name is what the image is called unless its builder says otherwise.
	Name string `yaml:"name"`
	// Packages are the packages of the image, beside those that are essential or required, and
	// apt. One may have a version: git=1:2.39.5-0+deb12u3. What they depend on comes with them.
	Packages []string `yaml:"packages"`
	// Recommends has packages come with those that they recommend.
	Recommends bool `yaml:"recommends"`
	// Instead is the OCI image to use where the host has no packages of Debian or Ubuntu.
	Instead string `yaml:"instead"`
	// User is the user whom commands run as. Empty: root.
	User string `yaml:"user"`
	// WorkDir is the directory that commands run in. Empty: /.
	WorkDir string `yaml:"workdir"`
	// Env is the environment of commands, by name.
	Env map[string]string `yaml:"env"`
	// Command is what runs when no command is given. Empty: a shell.
	Command []string `yaml:"command"`
	// Setup are lines of a shell that are run by root in a machine without a network when all
	// packages are configured.
	Setup []string `yaml:"setup"`
}

// maxRecipe bounds a file of a recipe, in bytes.
const maxRecipe = 1 << 20

//go:embed recipes/*.yaml
var recipeFiles embed.FS

// IsBuiltIn reports whether a name is built in.
func IsBuiltIn(name string) bool { return slices.Contains(Names(), name) }

// BuiltIn returns the recipe that a built-in name means.
func BuiltIn(name string) (Recipe, bool) {
	if !IsBuiltIn(name) {
		return Recipe{}, false
	}
	text, err := recipeFiles.ReadFile("recipes/" + name + ".yaml")
	if err != nil {
		return Recipe{}, false
	}
	recipe, err := Parse(name+".yaml", text)
	return recipe, err == nil // a test parses each
}

// Names returns the built-in names, in order.
func Names() []string {
	entries, err := recipeFiles.ReadDir("recipes")
	if err != nil {
		return nil
	}
	var names []string
	for _, entry := range entries {
		names = append(names, strings.TrimSuffix(entry.Name(), ".yaml"))
	}
	return names
}

// ReadRecipe reads the file of a recipe. An error names the file, and the line where it has one.
func ReadRecipe(file string) (Recipe, error) {
	opened, err := os.Open(file)
	if err != nil {
		return Recipe{}, fmt.Errorf("read recipe: %w", err)
	}
	defer func() { _ = opened.Close() }()
	text, err := io.ReadAll(io.LimitReader(opened, maxRecipe+1))
	switch {
	case err != nil:
		return Recipe{}, fmt.Errorf("read recipe %s: %w", file, err)
	case len(text) > maxRecipe:
		return Recipe{}, fmt.Errorf("recipe %s: is larger than %d KiB", file, maxRecipe>>10)
	}
	return Parse(filepath.Base(file), text)
}

// Parse reads the text of a recipe, which came from a file of that name.
func Parse(file string, text []byte) (Recipe, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.KnownFields(true)
	var recipe Recipe
	err := decoder.Decode(&recipe)
	if err == nil {
		if more := decoder.Decode(new(yaml.Node)); !errors.Is(more, io.EOF) {
			err = errors.New("has more than one document")
		}
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("is empty")
	}
	if err == nil {
		err = recipe.Check()
	}
	if err != nil {
		return Recipe{}, &smolvm.Error{Hint: "docs/images.md has the keys of a recipe",
			Err: fmt.Errorf("recipe %s: %s", file, inWords(err))}
	}
	return recipe, nil
}

// unknownKey is how the decoder words a key that there is not.
var unknownKey = regexp.MustCompile(`field (\S+) not found in type \S+`)

// inWords returns an error of the decoder without the names of Go's types.
func inWords(err error) string {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	text = strings.TrimPrefix(text, "unmarshal errors:\n  ")
	text = strings.ReplaceAll(text, "\n  ", "; ")
	return unknownKey.ReplaceAllString(text, "there is no key $1")
}

// Check checks what a recipe says.
func (r Recipe) Check() error {
	for _, name := range r.Packages {
		if err := checkPackage(name); err != nil {
			return err
		}
	}
	for name, value := range r.Env {
		if name == "" || strings.ContainsAny(name, "=\x00\n") || strings.Contains(value, "\x00") {
			return fmt.Errorf("env: %.100q is no variable", name)
		}
	}
	for _, line := range slices.Concat(r.Setup, r.Command, []string{r.User}) {
		if strings.Contains(line, "\x00") {
			return fmt.Errorf("%.100q has a NUL", line)
		}
	}
	if r.WorkDir != "" && !path.IsAbs(r.WorkDir) {
		return fmt.Errorf("workdir: %.100q is no absolute path", r.WorkDir)
	}
	return nil
}

// checkPackage checks what apt is asked for: nothing that it might take for an option, a pattern
// or a removal.
func checkPackage(asked string) error {
	name, version, versioned := strings.Cut(asked, "=")
	if !deb.IsName(name) || strings.HasSuffix(name, "-") || versioned && !deb.IsVersion(version) {
		return fmt.Errorf("%.100q is no name of a package; a version may follow it after =", asked)
	}
	return nil
}

// Key returns what changes whenever a recipe or this program makes another image on a host.
func (r Recipe) Key(host Release) (string, error) {
	r.Name = "" // the same image may have several
	text, err := json.Marshal(struct {
		Version int
		Host    Release
		Recipe  Recipe
		Files   []File
		Script  string
	}{keyVersion, host, r, imageFiles(host, ""), configureScript})
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// keyVersion changes whenever the same recipe makes another image, and nothing else shows it.
const keyVersion = 1

// Environment returns the environment of a recipe's commands, as NAME=value, in order.
func (r Recipe) Environment() []string {
	env := map[string]string{"PATH": ociconfig.DefaultPath}
	maps.Copy(env, r.Env)
	var list []string
	for _, name := range slices.Sorted(maps.Keys(env)) {
		list = append(list, name+"="+env[name])
	}
	return list
}
