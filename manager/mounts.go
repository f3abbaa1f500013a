package manager

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/hostdir"
)

// checkMounts looks at the directories of the host that a VM is to have. It returns what can be
// done about what is wrong.
func (m *Manager) checkMounts(config smolvm.VMConfig, bad func(field string, err error)) (hint string) {
	for i, mount := range config.Mounts {
		err := hostdir.Check(mount.Source, m.dir.Root(), m.socketDir)
		if err == nil {
			continue
		}
		bad(fmt.Sprintf("mounts[%d].source", i), err)
		if errors.Is(err, fs.ErrNotExist) {
			hint = fmt.Sprintf("make it first: mkdir -p %s", mount.Source)
		}
	}
	return hint
}
