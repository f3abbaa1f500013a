package image

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/image/cpio"
)

// writeInitramfs writes an initramfs that holds a program as its init, modules, and
// what a kernel expects to find. It is not compressed: an emulated guest takes
// longer to unpack it than to read it.
func writeInitramfs(w io.Writer, init []byte, modules moduleSet) error {
	order, contents, err := modules.loadOrder()
	if err != nil {
		return err
	}
	manifest, err := json.MarshalIndent(order, "", "\t")
	if err != nil {
		return err
	}
	archive := cpio.NewWriter(w)
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", "lib", modulesDir[1:], "newroot"} {
		archive.Dir(dir, 0o755)
	}
	// The kernel opens the console before anything is mounted; without it the init
	// would have no standard streams.
	archive.CharDevice("dev/console", 0o600, 5, 1)
	archive.CharDevice("dev/null", 0o666, 1, 3)
	archive.File("init", 0o755, init)
	archive.File(wire.ModulesManifest[1:], 0o644, manifest)
	for _, path := range slices.Sorted(maps.Keys(contents)) {
		archive.File(path[1:], 0o644, contents[path])
	}
	if err := archive.Close(); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return nil
}
