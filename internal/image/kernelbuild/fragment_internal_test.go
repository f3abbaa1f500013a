package kernelbuild

import (
	"slices"
	"strings"
	"testing"
)

func TestUnmet(t *testing.T) {
	t.Parallel()
	fragment := "# A word.\nCONFIG_A=y\nCONFIG_N=64\n# CONFIG_OFF is not set\n\n" + someVersions + "\nCONFIG_NEW=y\n# CONFIG_OLD is not set\n"
	for name, test := range map[string]struct {
		config string
		want   []string
	}{
		"as asked":         {"CONFIG_A=y\nCONFIG_N=64\n# CONFIG_OFF is not set\nCONFIG_NEW=y\n# CONFIG_OLD is not set\nCONFIG_MORE=y\n", nil},
		"less to switch":   {"CONFIG_A=y\nCONFIG_N=64\n", nil},
		"nothing":          {"", []string{"CONFIG_A=y (there is no such option", "CONFIG_N=64 (there is no such option"}},
		"otherwise":        {"# CONFIG_A is not set\nCONFIG_N=640\nCONFIG_OFF=y\n", []string{"CONFIG_A=y (it has # CONFIG_A", "CONFIG_N=64 (it has CONFIG_N=640)", "# CONFIG_OFF is not set (it has CONFIG_OFF=y)"}},
		"a module":         {"CONFIG_A=m\nCONFIG_N=64\n", []string{"CONFIG_A=y (it has CONFIG_A=m)"}},
		"off where it is":  {"CONFIG_A=y\nCONFIG_N=64\n# CONFIG_NEW is not set\n", []string{"CONFIG_NEW=y (it has # CONFIG_NEW"}},
		"on where it is":   {"CONFIG_A=y\nCONFIG_N=64\nCONFIG_OLD=y\n", []string{"# CONFIG_OLD is not set (it has CONFIG_OLD=y)"}},
		"another's prefix": {"CONFIG_AA=y\nCONFIG_N=64\n", []string{"CONFIG_A=y (there is no such option"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := unmet(fragment, test.config)
			ok := len(got) == len(test.want)
			for _, want := range test.want {
				ok = ok && slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, want) })
			}
			if !ok {
				t.Errorf("it says %q, and should say %q", got, test.want)
			}
		})
	}
}

// Every line of the configuration is a comment or sets an option, each once, so that none is lost by
// a slip of the pen.
func TestGuestConfig(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for line := range strings.Lines(guestConfig) {
		line = strings.TrimSuffix(line, "\n")
		o, ok := readOption(line)
		switch {
		case !ok && line != "" && !strings.HasPrefix(line, "# "), !ok && strings.Contains(line, "CONFIG_"):
			t.Errorf("line %q is neither an option nor a comment", line)
		case ok && seen[o.name]:
			t.Errorf("%s is there twice", o.name)
		case ok:
			seen[o.name] = true
		}
	}
	if !strings.Contains(guestConfig, "\n\n"+someVersions+"\n") || len(seen) < 200 {
		t.Errorf("it has %d options", len(seen))
	}
}
