package disk

import (
	"path/filepath"
	"strings"
)

// FormatOf returns the format of a disk that smolvm has made. Its name declares it, by the
// ending: [Raw] or, for any other, [QCOW2]. What the name has for a moment, before the disk
// takes the place of another, does not count.
func FormatOf(path string) string {
	for _, suffix := range []string{newSuffix, ClaimedSuffix} {
		path = strings.TrimSuffix(path, suffix)
	}
	if filepath.Ext(path) == "."+Raw {
		return Raw
	}
	return QCOW2
}

// ClaimedSuffix ends the name that the disk of a claimed VM has for the moment before it takes
// the place of the VM's own.
const ClaimedSuffix = ".claimed"
