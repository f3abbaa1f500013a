package distro

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/image/apt"
	"github.com/smolvm/smolvm/internal/image/deb"
)

// Source is where packages come from: the mirrors of the host's apt, with its keys, by lists and
// downloads of our own, which stay for the next time. It is used by one process at a time.
type Source struct {
	apt     *apt.Client
	dir     string
	release Release
}

// aptConfig takes away what the host has apt do beside its work: programs that it starts, lists
// for programs with windows, other architectures.
const aptConfig = `#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
#clear APT::NeverAutoRemove;
#clear AptCli::Hooks;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear Acquire::IndexTargets;
Acquire::IndexTargets::deb::Packages {
	MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
	flatMetaKey "Packages";
	ShortDescription "Packages";
	Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
	flatDescription "$(RELEASE) Packages";
	Optional "0";
};
`

// ErrNoPackages reports that this host has no packages of Debian or Ubuntu.
var ErrNoPackages = errors.New("this host has no packages of Debian or Ubuntu")

// OpenSource returns the packages of this host's distribution, kept in a directory that is made.
// The error matches [ErrNoPackages] where there is no apt.
func OpenSource(dir string, release Release) (*Source, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"lists/partial", "archives/partial", "cache"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			return nil, err
		}
	}
	preferences, err := os.ReadFile("/etc/apt/preferences")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for name, text := range map[string]string{
		"status": "", "apt.conf": aptConfig, "preferences": release.preferences() + string(preferences),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	client, err := apt.New(dir,
		"Dir::State="+dir, "Dir::State::Lists="+filepath.Join(dir, "lists"), "Dir::State::status="+filepath.Join(dir, "status"),
		"Dir::Cache="+filepath.Join(dir, "cache"), "Dir::Cache::archives="+filepath.Join(dir, "archives"),
		"Dir::Etc::preferences="+filepath.Join(dir, "preferences"),
		"APT::Architecture="+release.Arch, "APT::Architectures::="+release.Arch,
		"Acquire::Languages=none", "APT::Get::List-Cleanup=1", "Acquire::Retries=3")
	if errors.Is(err, apt.ErrMissing) {
		err = fmt.Errorf("%w: %w", ErrNoPackages, err)
	}
	if err != nil {
		return nil, err
	}
	client.AddFile(filepath.Join(dir, "apt.conf"))
	return &Source{apt: client, dir: dir, release: release}, nil
}

// Update fetches the lists of packages, of which what has not changed is not fetched again. Where
// mirrors can't be reached it is enough to have some of an earlier time; warning tells of that.
// Lists that nobody has signed, or the wrong one, are an error.
func (s *Source) Update(ctx context.Context, progress func(percent float64)) (warning string, err error) {
	complaint, err := s.apt.Fetch(ctx, progress, "update")
	if failed, ok := errors.AsType[*apt.Error](err); ok {
		complaint = failed.Complaint
	} else if err != nil {
		return "", err
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if line := lineWith(complaint, "signature", "NO_PUBKEY", "is not signed", "BADSIG", "GPG error"); line != "" {
		return "", &smolvm.Error{Hint: "`apt-get update` as root has to succeed on this host first",
			Err: fmt.Errorf("package lists are not signed by a key of this host: %s", line)}
	}
	lists, globErr := glob.In(filepath.Join(s.dir, "lists"), "*_Packages*")
	if globErr != nil {
		return "", globErr
	}
	if len(lists) == 0 {
		return "", &smolvm.Error{Hint: "does `apt-get update` succeed on this host?",
			Err: fmt.Errorf("fetch package lists: %s", cmp.Or(apt.LastWords(complaint), "apt has no sources"))}
	}
	return lineWith(complaint, "Failed to fetch", "Could not", "Temporary failure", "Err:"), nil
}

// lineWith returns the first line of apt's that has one of the words, without its mark.
func lineWith(text string, words ...string) string {
	for line := range strings.Lines(text) {
		for _, word := range words {
			if strings.Contains(line, word) {
				line = strings.TrimSpace(line)
				return strings.TrimPrefix(strings.TrimPrefix(line, "W: "), "E: ")
			}
		}
	}
	return ""
}

// Package is a package that apt has chosen.
type Package struct {
	Name, Version, Arch string
}

// file returns the name of the package's file, as apt makes it.
func (p Package) file() string {
	return strings.ReplaceAll(p.Name+"_"+p.Version+"_"+p.Arch+".deb", ":", "%3a")
}

// essential are the patterns of what every image has. usr-is-merged is asked for so that nothing
// brings usrmerge, which would convert what is so already.
func (s *Source) essential(ctx context.Context) []string {
	asked := []string{"?essential", "?priority(required)", "apt"}
	if out, _, err := s.apt.Run(ctx, "apt-cache", "show", "--no-all-versions", "usr-is-merged"); err == nil && strings.Contains(out, "Package:") {
		asked = append(asked, "usr-is-merged")
	}
	return asked
}

// chosen is a line of a simulation: Inst NAME (VERSION ORIGIN [ARCH]).
var chosen = regexp.MustCompile(`^Inst ([^ :]+)(?::[^ ]+)? \(([^ ]+) .*\[([a-z0-9-]+)\]\)`)

// Plan returns the packages that an image has in the order in which apt would unpack them.
func (s *Source) Plan(ctx context.Context, recipe Recipe) ([]Package, error) {
	out, _, err := s.apt.Run(ctx, "apt-get", s.install(ctx, recipe, "--simulate")...)
	if err != nil {
		return nil, s.explain(ctx, err)
	}
	var plan []Package
	for line := range strings.Lines(out) {
		if match := chosen.FindStringSubmatch(line); match != nil {
			plan = append(plan, Package{Name: match[1], Version: match[2], Arch: match[3]})
		} else if strings.HasPrefix(line, "Inst ") {
			return nil, fmt.Errorf("read what apt has chosen: %.200q", line)
		}
	}
	if len(plan) == 0 {
		return nil, errors.New("apt has chosen no packages")
	}
	return plan, nil
}

// install returns the arguments of apt-get that install a recipe's packages.
func (s *Source) install(ctx context.Context, recipe Recipe, how string) []string {
	args := []string{how, "--yes", "--quiet", "-o", fmt.Sprintf("APT::Install-Recommends=%t", recipe.Recommends),
		"-o", "APT::Install-Suggests=false", "install"}
	return slices.Concat(args, s.essential(ctx), recipe.Packages)
}

// Missing returns how many bytes there are to download.
func (s *Source) Missing(ctx context.Context, recipe Recipe) (int64, error) {
	out, _, err := s.apt.Run(ctx, "apt-get", s.install(ctx, recipe, "--print-uris")...)
	if err != nil {
		return 0, s.explain(ctx, err)
	}
	var total int64
	for line := range strings.Lines(out) {
		// 'URI' FILE SIZE and a sum of a kind that is not always there
		if words := strings.Fields(line); len(words) >= 3 && strings.HasPrefix(line, "'") {
			size, err := strconv.ParseInt(words[2], 10, 64)
			if err != nil || size < 0 {
				return 0, fmt.Errorf("read what apt is to download: %.200q", line)
			}
			total += size
		}
	}
	return total, nil
}

// Fetch downloads packages that are not there yet, and returns their files in the plan's order.
// What was cut off goes on.
func (s *Source) Fetch(ctx context.Context, recipe Recipe, plan []Package, progress func(percent float64)) ([]string, error) {
	if _, err := s.apt.Fetch(ctx, progress, s.install(ctx, recipe, "--download-only")...); err != nil {
		return nil, s.explain(ctx, err)
	}
	var files []string
	for _, p := range plan {
		path := filepath.Join(s.dir, "archives", p.file())
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("download package %s: apt-get says that it did: %w", p.Name, err)
		}
		files = append(files, path)
	}
	return files, nil
}

// Clean removes downloads that no mirror has any more.
func (s *Source) Clean(ctx context.Context) error {
	_, _, err := s.apt.Run(ctx, "apt-get", "--quiet", "autoclean")
	return err
}

// explain words an error of apt's for a person.
func (s *Source) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var failed *apt.Error
	if !errors.As(err, &failed) {
		return err
	}
	hint := ""
	var reasons []string
	for line := range strings.Lines(failed.Complaint) {
		line = strings.TrimSpace(line)
		reason, ok := strings.CutPrefix(line, "E: ")
		switch {
		case !ok:
			continue
		case strings.HasPrefix(reason, "Unable to locate package "), strings.HasPrefix(reason, "Couldn't find any package by "):
			name := strings.TrimPrefix(strings.TrimPrefix(reason, "Unable to locate package "), "Couldn't find any package by ")
			reason, hint = fmt.Sprintf("%s has no package %s", s.release, name), "`apt-cache search` finds packages by words"
		case strings.Contains(reason, "404 "):
			hint = "the mirror has newer packages by now: try again"
		case strings.Contains(reason, "ash Sum mismatch"), strings.Contains(reason, "unexpected size"):
			hint = "the mirror, or a proxy before it, is not up to date: try again later"
		}
		if !slices.Contains(reasons, reason) {
			reasons = append(reasons, reason)
		}
	}
	if _, unmet, ok := strings.Cut(failed.Out, "unmet dependencies:\n"); ok {
		lines := strings.Split(strings.TrimSpace(unmet), "\n")
		for _, line := range lines[:min(len(lines), 3)] {
			reasons = append(reasons, strings.Join(strings.Fields(line), " "))
		}
	}
	if len(reasons) == 0 {
		return err
	}
	return &smolvm.Error{Hint: hint, Err: errors.New(strings.Join(reasons[:min(len(reasons), 4)], "; "))}
}

// Mirrors returns a file of sources for apt in a guest: the distribution's own of those that the
// host uses, without what a guest can't reach or must not see. See sources.list(5).
func (s *Source) Mirrors(ctx context.Context) (string, error) {
	out, _, err := s.apt.Run(ctx, "apt-get", "indextargets")
	if err != nil {
		return "", err
	}
	targets, err := deb.ParseParagraphs(out)
	if err != nil {
		return "", fmt.Errorf("read apt's sources: %w", err)
	}
	return s.release.mirrors(targets), nil
}

// mirrors returns a file of sources, given apt's lists of packages.
func (r Release) mirrors(targets []deb.Paragraph) string {
	type suite struct{ uri, name string }
	components := map[suite][]string{}
	var order []suite
	for _, target := range targets {
		if target.Get("Origin") != r.origin() || !strings.HasPrefix(target.Get("Codename"), r.Codename) {
			continue
		}
		uri, err := url.Parse(target.Get("Repo-URI"))
		if err != nil || uri.Scheme != "http" && uri.Scheme != "https" {
			continue
		}
		uri.User = nil
		key := suite{uri.String(), target.Get("Release")}
		if components[key] == nil {
			order = append(order, key)
		}
		if component := target.Get("Component"); !slices.Contains(components[key], component) {
			components[key] = append(components[key], component)
		}
	}
	if len(order) == 0 {
		return r.usualMirrors()
	}
	var text strings.Builder
	for _, key := range order {
		text.WriteString(r.mirror(key.uri, key.name, strings.Join(components[key], " ")))
	}
	return text.String()
}

func (r Release) mirror(uri, suite, components string) string {
	return fmt.Sprintf("Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\nSigned-By: /usr/share/keyrings/%s-archive-keyring.gpg\n\n",
		uri, suite, components, r.ID)
}

// usualMirrors returns the sources of a release for a host whose own are of no use to a guest.
func (r Release) usualMirrors() string {
	switch r.ID {
	case "debian":
		return r.mirror("http://deb.debian.org/debian/", r.Codename+" "+r.Codename+"-updates", "main") +
			r.mirror("http://deb.debian.org/debian-security/", r.Codename+"-security", "main")
	case "ubuntu":
		uri := "http://archive.ubuntu.com/ubuntu/"
		if r.Arch != "amd64" {
			uri = "http://ports.ubuntu.com/ubuntu-ports/"
		}
		return r.mirror(uri, r.Codename+" "+r.Codename+"-updates "+r.Codename+"-security", "main universe")
	}
	return ""
}
