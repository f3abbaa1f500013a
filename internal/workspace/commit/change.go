package commit

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/dockerfile"
)

// Changes returns what changes a configuration by instructions of a Dockerfile, one each, such as
// `ENV A=1`: those that are about the configuration only.
func Changes(instructions []string, arch string) func(ctx context.Context, config *Config) error {
	return func(ctx context.Context, config *Config) error {
		for _, instruction := range instructions {
			if err := change(ctx, config, instruction, arch); err != nil {
				return fmt.Errorf("change %q: %w", instruction, err)
			}
		}
		return nil
	}
}

// changing are the instructions by which a configuration can be changed.
func changing() []string {
	return []string{"CMD", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "LABEL", "ONBUILD", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}
}

func change(ctx context.Context, config *Config, instruction, arch string) error {
	word, _, _ := strings.Cut(strings.TrimSpace(instruction), " ")
	known := false
	for _, name := range changing() {
		known = known || strings.EqualFold(word, name)
	}
	if !known || strings.ContainsAny(instruction, "\n\r") {
		return &smolvm.Error{Err: errors.New("it is no instruction that changes a configuration"), Hint: "give one of " + strings.Join(changing(), ", ") + ", as in a Dockerfile, on one line"}
	}
	base := *config
	history := base.History
	// What an image has for those that are based on it is not for itself.
	onBuild := base.Config.OnBuild
	base.Config.OnBuild = nil
	plan, err := dockerfile.New(ctx, []byte("FROM image\n"+instruction+"\n"), dockerfile.Options{
		Name: "--change", Arch: arch,
		Base: func(context.Context, string) (dockerfile.Config, error) { return base, nil },
	})
	if err != nil {
		if at, ok := errors.AsType[*dockerfile.Error](err); ok {
			return at.Err // its line is of a file that nobody has
		}
		return err
	}
	changed := plan.Target().Config
	changed.Config.OnBuild = append(slices.Clip(onBuild), changed.Config.OnBuild...)
	changed.History = history
	*config = changed
	return nil
}
