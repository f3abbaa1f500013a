package dockerfile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	mode "github.com/tonistiigi/dchapes-mode"

	"github.com/smolvm/smolvm/internal/image/ociconfig"
)

// copyFlags are the flags that COPY and ADD share.
type copyFlags struct {
	name, owner, mode string
	exclude           []string
}

// copy plans a COPY.
func (p *planner) copy(ctx context.Context, d *draft, c *instructions.CopyCommand, step *Step) error {
	if c.Parents {
		return refuse("--parents", "copy each directory to its place")
	}
	flags := copyFlags{"COPY", c.Chown, c.Chmod, c.ExcludePatterns}
	copied, err := planCopy(d, c.SourcesAndDest, flags, step)
	if err != nil {
		return err
	}
	for _, source := range c.SourcePaths {
		if isURL(source) || isGit(source) {
			return fmt.Errorf("%q: COPY takes files only, and no URL", source)
		}
	}
	if c.From != "" {
		if strings.Contains(c.From, "$") {
			return fmt.Errorf("--from=%s: it can't have variables; name a stage by `FROM %s AS NAME`", c.From, c.From)
		}
		if copied.From, err = p.source(ctx, d, c.From); err != nil {
			return fmt.Errorf("--%w", err)
		}
	}
	step.Op = copied
	return nil
}

// addFiles plans an ADD.
func (p *planner) addFiles(d *draft, c *instructions.AddCommand, step *Step) error {
	for _, source := range c.SourcePaths {
		switch {
		case isGit(source):
			return refuse("the repository "+strconv.Quote(source), "clone it in a RUN, which has the guest's network and its policy")
		case isURL(source):
			return refuse("the URL "+strconv.Quote(source), "fetch it in a RUN, which has the guest's network and its policy, or put it into the context")
		}
	}
	switch {
	case c.KeepGitDir != nil:
		return refuse("--keep-git-dir", "repositories are cloned in a RUN")
	case c.Checksum != "":
		return errors.New("--checksum is for URLs and repositories")
	}
	copied, err := planCopy(d, c.SourcesAndDest, copyFlags{"ADD", c.Chown, c.Chmod, c.ExcludePatterns}, step)
	if err != nil {
		return err
	}
	copied.Unpack = c.Unpack == nil || *c.Unpack
	step.Op = copied
	return nil
}

// planCopy plans what COPY and ADD share.
func planCopy(d *draft, c instructions.SourcesAndDest, flags copyFlags, step *Step) (*Copy, error) {
	if flags.owner != "" {
		if _, err := ociconfig.ParseUser(flags.owner); err != nil {
			return nil, fmt.Errorf("--chown: %w", err)
		}
	}
	if err := checkMode(flags.mode); err != nil {
		return nil, err
	}
	copied := &Copy{Dest: destination(d, c.DestPath), Owner: flags.owner, Mode: flags.mode, Exclude: flags.exclude}
	history := []string{flags.name}
	if flags.owner != "" {
		history = append(history, "--chown="+flags.owner)
	}
	if flags.mode != "" {
		history = append(history, "--chmod="+flags.mode)
	}
	for _, source := range c.SourcePaths {
		if source == "" {
			return nil, errors.New("a source is empty")
		}
		history = append(history, source)
		copied.Paths = append(copied.Paths, relative(source))
	}
	for _, file := range c.SourceContents {
		if err := checkFileName(file.Path); err != nil {
			return nil, err
		}
		history = append(history, "<<"+file.Path)
		copied.Files = append(copied.Files, File{Name: file.Path, Content: file.Data, Mode: 0o644})
	}
	step.History = strings.Join(append(history, c.DestPath), " ") + " # buildkit"
	return copied, nil
}

// destination returns where files are copied to: an absolute path, with a slash at its end if it
// is a directory.
func destination(d *draft, name string) string {
	dest := absolute(d.stage.Config.Config.WorkingDir, name)
	if isDir := name == "" || name == "." || strings.HasSuffix(name, "/") || strings.HasSuffix(name, "/."); isDir && dest != "/" {
		dest += "/"
	}
	return dest
}

// checkMode checks the value of --chmod.
func checkMode(text string) error {
	if text == "" {
		return nil
	}
	if bits, err := strconv.ParseUint(text, 8, 32); err == nil {
		if bits > 0o7777 {
			return fmt.Errorf("--chmod=%s: it is above 7777", text)
		}
		return nil
	}
	if _, err := mode.Parse(text); err != nil {
		return fmt.Errorf("--chmod=%s: give an octal number up to 7777, or a mode such as u=rwX,go=rX", text)
	}
	return nil
}

func isURL(source string) bool {
	return strings.HasPrefix(source, "http://") || strings.HasPrefix(source, "https://")
}

// gitURL matches repositories: as docker, by their scheme, or by what scp has.
var gitURL = regexp.MustCompile(`^(git://|ssh://|git@|[A-Za-z0-9_.-]+@[A-Za-z0-9.-]+:|https?://[^#]+\.git(#|$))`)

func isGit(source string) bool {
	return gitURL.MatchString(source) || strings.HasPrefix(source, "github.com/")
}

func sortedKeys(values map[string]string) []string { return slices.Sorted(maps.Keys(values)) }
