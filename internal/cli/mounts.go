package cli

import (
	"fmt"
	"strings"

	"github.com/smolvm/smolvm"
)

// parseMount reads a directory of the host and where it is to be in the guest:
// DIR:TARGET[:MODE]. A colon in a path can't be written.
func parseMount(text string) (smolvm.Mount, error) {
	parts := strings.Split(text, ":")
	mount := smolvm.Mount{Source: parts[0]}
	switch {
	case len(parts) == 2:
	case len(parts) == 3 && parts[2] != "":
		mount.Mode = smolvm.MountMode(parts[2])
	default:
		return mount, fmt.Errorf("invalid volume %q; use DIR:TARGET[:ro|:rw|:overlay], as in ./src:/project", text)
	}
	mount.Target = parts[1]
	switch {
	case mount.Source == "" || mount.Target == "":
		return mount, fmt.Errorf("invalid volume %q; use DIR:TARGET[:ro|:rw|:overlay], as in ./src:/project", text)
	case !strings.Contains(mount.Source, "/") && mount.Source != "." && mount.Source != "..":
		return mount, fmt.Errorf("invalid volume %q: there are no named volumes; for the directory, write ./%s", text, text)
	}
	return mount, nil
}
