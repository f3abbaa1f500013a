package kernelbuild

import (
	_ "embed"
	"fmt"
	"slices"
	"strings"
)

// guestConfig are the options that are added to the source's own tinyconfig.
//
//go:embed guest.config
var guestConfig string

// someVersions begins the paragraph of the options that a version of the kernel may lack.
const someVersions = "# Only some versions have these."

// option is a line of a configuration that sets an option, or says that it is not set.
type option struct{ name, line string }

// readOption reads a line; ok is false for one of another kind.
func readOption(line string) (_ option, ok bool) {
	line = strings.TrimSpace(line)
	if name, found := strings.CutSuffix(line, " is not set"); found {
		name, found = strings.CutPrefix(name, "# ")
		return option{name, line}, found && isOption(name)
	}
	name, _, found := strings.Cut(line, "=")
	return option{name, line}, found && isOption(name)
}

func isOption(name string) bool {
	return strings.HasPrefix(name, "CONFIG_") && !strings.ContainsAny(name, " \t#")
}

// unmet returns what is asked for by a fragment and is otherwise in a whole configuration, in words.
// An option that is not set need not be there; of those that only some versions have, that is true of
// the others too.
func unmet(fragment, config string) []string {
	has := map[string]string{}
	for line := range strings.Lines(config) {
		if o, ok := readOption(line); ok {
			has[o.name] = o.line
		}
	}
	var wrong []string
	for paragraph := range strings.SplitSeq(fragment, "\n\n") {
		optional := strings.Contains(paragraph, someVersions)
		for line := range strings.Lines(paragraph) {
			asked, ok := readOption(line)
			if !ok {
				continue
			}
			got, there := has[asked.name]
			off := strings.HasSuffix(asked.line, " is not set")
			switch {
			case got == asked.line, !there && (off || optional):
			case !there:
				wrong = append(wrong, asked.line+" (there is no such option, or what it depends on is off)")
			default:
				wrong = append(wrong, fmt.Sprintf("%s (it has %s)", asked.line, got))
			}
		}
	}
	slices.Sort(wrong)
	return slices.Compact(wrong)
}
