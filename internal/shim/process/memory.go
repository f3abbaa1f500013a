package process

import (
	"bufio"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A shim idles for most of its life, and there is one for each VM, so it is kept
// small. Measured (PSS of a single shim, with network and agent): 16 MB without any of
// this, 7 MB with it, also after use. Most of that is dropping the program's pages;
// what is not linked in counts as well, see package usernet.

// limitMemory is called before anything is allocated.
func limitMemory() {
	// There is little garbage, so collecting it often costs nothing. It saves 1.3 MB
	// when 120 MB have passed through.
	debug.SetGCPercent(20)
	// Each processor that Go uses has caches of its own.
	runtime.GOMAXPROCS(min(runtime.NumCPU(), 2))
	debug.SetMemoryLimit(softMemory)
	debug.SetMaxStack(maxStack)
	// It would hold keys. That it can't be set does no harm to anybody but this process.
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
}

// A shim reads what a guest sends, so whatever a guest makes it keep has an end: from
// softMemory on the garbage collector does all that it can, and at hardMemory the shim dies,
// and the VM with it. In use, with many connections, it takes some 50 MB.
const (
	softMemory = 256 << 20
	hardMemory = 512 << 20
	maxStack   = 16 << 20
)

// boundData makes the kernel refuse this process more than hardMemory, which ends it. It
// can be undone, as programs that are started inherit it.
func boundData() { setData(hardMemory) }

// releaseData undoes boundData.
func releaseData() { setData(unix.RLIM_INFINITY) }

func setData(most uint64) {
	var now unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_DATA, &now) == nil {
		_ = unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: min(most, now.Max), Max: now.Max}) // lowering it can't fail
	}
}

// quiet is how long nothing must have happened before memory is given back.
const quiet = time.Second

// releaseMemory gives back what is not needed while nothing happens.
func releaseMemory() {
	debug.FreeOSMemory()
	dropProgramPages()
}

// dropProgramPages unmaps the program's own code and constants, of which a start
// touches many megabytes. They come back one by one, from the page cache, as they
// are used again.
func dropProgramPages() {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	smaps, err := os.Open("/proc/self/smaps")
	if err != nil {
		return
	}
	defer func() { _ = smaps.Close() }()
	for _, m := range unchangedMappings(smaps, program) {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
	}
}

// mapping is a range of addresses.
type mapping struct{ start, end uintptr }

// unchangedMappings finds the mappings of a file that can't be written and have no
// page that differs from the file: in a position-independent program, constants with
// addresses in them do, although they can't be written any more. See
// proc_pid_smaps(5).
func unchangedMappings(smaps io.Reader, file string) []mapping {
	var found []mapping
	var current mapping // of the lines being read, if it is one to be found
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) >= 2 && strings.HasSuffix(fields[0], ":") {
			if fields[0] == "Anonymous:" && fields[1] == "0" && current.end != 0 {
				found = append(found, current)
			}
			continue
		}
		current = mapping{}
		// Address range, permissions, offset, device, inode, path.
		if len(fields) < 6 || strings.Join(fields[5:], " ") != file || strings.Contains(fields[1], "w") {
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		start, startErr := strconv.ParseUint(from, 16, 64)
		end, endErr := strconv.ParseUint(to, 16, 64)
		if startErr == nil && endErr == nil {
			current = mapping{uintptr(start), uintptr(end)}
		}
	}
	return found
}
