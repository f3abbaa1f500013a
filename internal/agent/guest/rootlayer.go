package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/smolvm/smolvm/internal/agent/layertar"
)

// identityPaths are the files by which the guest is known, which the agent writes.
func identityPaths() []string {
	return []string{"etc/hostname", "etc/machine-id", "etc/hosts", "etc/resolv.conf"}
}

// sendRoot sends the guest's own root file system, or what differs from a list.
func (o workspaceOrder) sendRoot(ctx context.Context) error {
	base, err := layertar.ReadBase(os.Stdin)
	if err != nil {
		return err
	}
	if o.Root.Pause {
		if err := pauseCommands(); err != nil {
			return err
		}
	}
	return layertar.Write(ctx, os.Stdout, "/", layertar.Options{Base: base, Skip: skipOfRoot, Replace: withoutAuthority})
}

// skipOfRoot leaves out of the guest's root file system what is the guest's and not an image's.
func skipOfRoot(path string) layertar.Skip {
	switch path {
	case "proc", "sys", "dev", "run":
		return layertar.Content
	case "lost+found", workspaceDir[1:], overlaysDir[1:], authorityFile:
		return layertar.Whole
	}
	if slices.Contains(identityPaths(), path) || slices.Contains(sources(), path) {
		return layertar.Whole
	}
	return layertar.Nothing
}

// withoutAuthority returns a bundle of authorities without that of the VM; nil for other files.
func withoutAuthority(path string, read func() ([]byte, error)) ([]byte, error) {
	if !slices.Contains(bundles(), path) {
		return nil, nil
	}
	bundle, err := read()
	if err != nil {
		return nil, err
	}
	if without := withoutMarked(bundle); len(without) > 0 {
		return without, nil
	}
	return []byte{}, nil
}

// pauseCommands holds all that was started over the guest channel and by SSH, but for this
// program.
func pauseCommands() error {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	groups, err := filepath.Glob(cgroupParent + "/*/cgroup.freeze")
	if err != nil {
		return err
	}
	for _, file := range groups {
		// Its line is "0::/smolvm/7": see cgroups(7).
		group := strings.TrimPrefix(filepath.Dir(file), cgroupMount)
		if strings.TrimSpace(string(own)) == "0::"+group {
			continue
		}
		if err := os.WriteFile(file, []byte("1"), 0); err != nil {
			return fmt.Errorf("pause the guest's commands: %w", err)
		}
	}
	return nil
}

// resumeCommands lets go on what was paused.
func resumeCommands() {
	groups, err := filepath.Glob(cgroupParent + "/*/cgroup.freeze")
	if err != nil {
		return
	}
	for _, file := range groups {
		_ = os.WriteFile(file, []byte("0"), 0)
	}
}
