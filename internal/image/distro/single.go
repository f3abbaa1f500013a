package distro

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/smolvm/smolvm/internal/image/deb"
)

// Candidate returns what the version of a package says of itself that apt would install; ok is
// false if there is none of that name.
func (s *Source) Candidate(ctx context.Context, name string) (_ deb.Paragraph, ok bool, err error) {
	out, _, err := s.apt.Run(ctx, "apt-cache", "show", "--no-all-versions", name)
	if ctx.Err() != nil {
		return deb.Paragraph{}, false, context.Cause(ctx)
	}
	if err != nil {
		return deb.Paragraph{}, false, nil //nolint:nilerr // It fails for a name that it does not know.
	}
	found, err := deb.ParseParagraphs(out)
	if err != nil {
		return deb.Paragraph{}, false, fmt.Errorf("read what package %s says of itself: %w", name, err)
	}
	// A virtual name has none, or those of other packages.
	i := slices.IndexFunc(found, func(p deb.Paragraph) bool { return p.Get("Package") == name })
	if i < 0 {
		return deb.Paragraph{}, false, nil
	}
	return found[i], true, nil
}

// Names returns the names of packages that begin so, in order.
func (s *Source) Names(ctx context.Context, beginning string) ([]string, error) {
	out, _, err := s.apt.Run(ctx, "apt-cache", "pkgnames", beginning)
	if err != nil {
		return nil, s.explain(ctx, err)
	}
	return slices.Sorted(slices.Values(strings.Fields(out))), nil
}

// Download downloads one package without those that it depends on, and returns its file, which is
// the caller's to move. It is what [Source.Candidate] has returned.
func (s *Source) Download(ctx context.Context, candidate deb.Paragraph, progress func(percent float64)) (string, error) {
	p := Package{Name: candidate.Get("Package"), Version: candidate.Get("Version"), Arch: candidate.Get("Architecture")}
	if _, err := s.apt.Fetch(ctx, progress, "download", p.Name+"="+p.Version); err != nil {
		return "", s.explain(ctx, err)
	}
	path := filepath.Join(s.dir, p.file())
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("download package %s: apt-get says that it did: %w", p.Name, err)
	}
	return path, nil
}
