package process

import (
	"slices"
	"strings"
	"testing"
)

func TestUnchangedMappings(t *testing.T) {
	// As in proc_pid_smaps(5), shortened.
	const smaps = `00400000-00c00000 r-xp 00000000 fe:00 1 /opt/my programs/smolvm
Rss:                4096 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
00c00000-01400000 r--p 00800000 fe:00 1 /opt/my programs/smolvm
Anonymous:             0 kB
01400000-01500000 r--p 01000000 fe:00 1 /opt/my programs/smolvm
Anonymous:            64 kB
01500000-01600000 rw-p 01100000 fe:00 1 /opt/my programs/smolvm
Anonymous:             0 kB
01600000-01700000 rw-p 00000000 00:00 0
Anonymous:             0 kB
7f0000000000-7f0000001000 r-xp 00000000 fe:00 2 /lib/libc.so
Anonymous:             0 kB
7ffc00000000-7ffc00002000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
`
	want := []mapping{{0x400000, 0xc00000}, {0xc00000, 0x1400000}}
	if got := unchangedMappings(strings.NewReader(smaps), "/opt/my programs/smolvm"); !slices.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
}
