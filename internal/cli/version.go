package cli

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is what is known of this build.
type version struct {
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	// Modified reports whether the build had changes that are in no commit.
	Modified bool   `json:"modified,omitempty"`
	Go       string `json:"go"`
	OS       string `json:"os"`
	Arch     string `json:"arch"`
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "version",
		Short:             "Print the version of this program",
		Args:              needs(0, 0, "no arguments"),
		ValidArgsFunction: words(),
		RunE: a.does(func(*cobra.Command, []string) error {
			v := a.version()
			if a.json {
				return a.printJSON(v)
			}
			return a.println(v.String())
		}),
	}
}

func (a *app) version() version {
	v := version{Version: a.Version, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	build, ok := debug.ReadBuildInfo()
	if ok {
		if v.Version == "" {
			v.Version = build.Main.Version
		}
		for _, setting := range build.Settings {
			switch setting.Key {
			case "vcs.revision":
				v.Commit = setting.Value
			case "vcs.modified":
				v.Modified = setting.Value == "true"
			}
		}
	}
	if v.Version == "" {
		v.Version = "unknown"
	}
	return v
}

func (v version) String() string {
	commit := ""
	if v.Commit != "" {
		commit = ", commit " + v.Commit[:min(len(v.Commit), 12)]
		if v.Modified {
			commit += " with changes"
		}
	}
	return fmt.Sprintf("smolvm %s%s, %s %s/%s", v.Version, commit, v.Go, v.OS, v.Arch)
}
