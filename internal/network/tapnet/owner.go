package tapnet

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/smolvm/smolvm/internal/proc"
)

// Owner says whose an object of the host is. It stands with each of them: in the alias of a
// TAP interface, and in the comment of an element or a rule of nftables. So whose they are is
// known from the host alone.
type Owner struct {
	// VM is the ID of the VM, and Directory that of the data directory which has its row.
	VM, Directory string
	// PID and Start are the process that holds the network, as in package proc.
	PID   int
	Start uint64
}

// mark is what the text of each owner begins with.
const mark = "smolvm:"

// maxOwner is how long the text of an owner may be, in bytes: what nftables keeps of a
// comment (NFTNL_UDATA_COMMENT_MAXLEN), less the NUL.
const maxOwner = 127

// OwnedBy returns the owner of what this process makes for a VM.
func OwnedBy(directory, vm string) (Owner, error) {
	pid := os.Getpid()
	start, err := proc.StartTime(pid)
	return Owner{VM: vm, Directory: directory, PID: pid, Start: start}, err
}

// DirectoryName returns the name of a data directory in owners: a short sum of its path.
func DirectoryName(path string) string {
	sum := sha256.Sum256([]byte(path))
	return hex.EncodeToString(sum[:8])
}

// String returns the text that stands with an object.
func (o Owner) String() string {
	return fmt.Sprintf("%s%s@%s/%d.%d", mark, o.VM, o.Directory, o.PID, o.Start)
}

// Describe returns the owner for a person.
func (o Owner) Describe() string {
	return fmt.Sprintf("VM %s of data directory %s (process %d)", o.VM, o.Directory, o.PID)
}

// Alive reports whether the owner's process is there. One of another PID namespace is not
// seen from here.
func (o Owner) Alive() bool { return proc.Alive(o.PID, o.Start) }

// check returns why an owner can't be written down.
func (o Owner) check() error {
	read, ok := parseOwner(o.String())
	if !ok || read != o {
		return fmt.Errorf("%q of data directory %q is no owner of a network", o.VM, o.Directory)
	}
	return nil
}

// parseOwner reads the text of an owner. What others have written is none.
func parseOwner(text string) (_ Owner, ok bool) {
	rest, ok := strings.CutPrefix(text, mark)
	vm, rest, at := strings.Cut(rest, "@")
	directory, process, slash := strings.Cut(rest, "/")
	pid, start, dot := strings.Cut(process, ".")
	o := Owner{VM: vm, Directory: directory}
	var pidErr, startErr error
	o.PID, pidErr = strconv.Atoi(pid)
	o.Start, startErr = strconv.ParseUint(start, 10, 64)
	ok = ok && at && slash && dot && pidErr == nil && startErr == nil && len(text) <= maxOwner &&
		isName(vm) && isName(directory) && o.String() == text
	return o, ok
}

func isName(text string) bool {
	return text != "" && strings.Trim(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") == ""
}
