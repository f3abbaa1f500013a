package jail

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

// Defaults of [Users].
const (
	// DefaultFirst is above what systemd gives to containers, and below what does not fit in
	// an int32, which some programs can't read; see systemd's docs/UIDS-GIDS.md.
	DefaultFirst = 0x7000_0000
	// DefaultCount is more than a host has VMs.
	DefaultCount = 1 << 14
	// DefaultLocks is lost with the host's power, as all processes are.
	DefaultLocks = "/run/smolvm/jail-users"
)

// Users are the ids that jails use: one of its own for each VM that runs on the host, so that no
// VMM can touch another. The zero value has the defaults.
type Users struct {
	// First is the lowest id, and Count how many there are.
	First, Count int
	// Locks is the path of a file by which those in use are told, the same for all of the
	// host's VMs. Its directory is made.
	Locks string
	// Root stands before the paths of the host's files. Empty: "/"; for tests.
	Root string
}

// User is an id that nobody else uses until [User.Release].
type User struct {
	id   int
	file *os.File
}

// Take returns the id of a user and a group that are none of the host's, nor in a range that
// the host gives to containers, nor of another jail.
func (u Users) Take() (*User, error) {
	user, err := u.take()
	if err != nil {
		return nil, fmt.Errorf("find a user for Firecracker's jail: %w", err)
	}
	return user, nil
}

func (u Users) take() (*User, error) {
	first, count := cmp.Or(u.First, DefaultFirst), cmp.Or(u.Count, DefaultCount)
	taken, err := u.taken()
	if err != nil {
		return nil, err
	}
	file, err := u.open()
	if err != nil {
		return nil, err
	}
	start, outside := rand.IntN(count), 0
	for i := range count {
		id := first + (start+i)%count
		if !taken.mapped(id) {
			outside++
			continue
		}
		if taken.has(id) {
			continue
		}
		// The kernel frees the lock when the process dies. A byte of the file is an id.
		lock := unix.Flock_t{Type: unix.F_WRLCK, Start: int64(id), Len: 1}
		switch err := unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &lock); {
		case err == nil:
			return &User{id: id, file: file}, nil
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES):
			return nil, errors.Join(&fs.PathError{Op: "lock", Path: file.Name(), Err: err}, file.Close())
		}
	}
	_ = file.Close()
	if outside == count {
		return nil, &smolvm.Error{Hint: "choose others that /proc/self/uid_map has, or run Firecracker without its jailer",
			Err: fmt.Errorf("this container has no users %d to %d", first, first+count-1)}
	}
	return nil, &smolvm.Error{Hint: "choose a range of ids that the host does not use",
		Err: fmt.Errorf("all users from %d to %d are in use by VMs, by the host, or by its containers", first, first+count-1)}
}

// ID returns the id of the user, and of the group.
func (u *User) ID() int { return u.id }

// Release gives the id back. Firecracker has ended.
func (u *User) Release() { _ = u.file.Close() }

// open opens the file of locks.
func (u Users) open() (*os.File, error) {
	path := cmp.Or(u.Locks, DefaultLocks)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
}

// idRange is a range of ids.
type idRange struct{ first, count int }

func (r idRange) has(id int) bool { return id >= r.first && id-r.first < r.count }

// takenIDs are the ids that are not for jails.
type takenIDs struct {
	users  []idRange
	uidMap []idRange // those that there are at all, in this user namespace
	gidMap []idRange
}

func (t takenIDs) has(id int) bool { return anyHas(t.users, id) }

func (t takenIDs) mapped(id int) bool { return anyHas(t.uidMap, id) && anyHas(t.gidMap, id) }

func anyHas(ranges []idRange, id int) bool {
	for _, r := range ranges {
		if r.has(id) {
			return true
		}
	}
	return false
}

// taken reads which ids the host uses, for users or groups.
func (u Users) taken() (t takenIDs, err error) {
	single := func(fields []string) (idRange, error) { return rangeOf(fields, 2, -1) }
	several := func(fields []string) (idRange, error) { return rangeOf(fields, 1, 2) }
	for _, list := range []struct {
		path  string
		parse func([]string) (idRange, error)
	}{
		{"/etc/passwd", single}, {"/etc/group", single}, {"/etc/subuid", several}, {"/etc/subgid", several},
	} {
		ranges, err := u.read(list.path, ":", list.parse)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return t, err
		}
		t.users = append(t.users, ranges...)
	}
	inside := func(fields []string) (idRange, error) { return rangeOf(fields, 0, 2) }
	if t.uidMap, err = u.read("/proc/self/uid_map", "", inside); err != nil {
		return t, err
	}
	t.gidMap, err = u.read("/proc/self/gid_map", "", inside)
	return t, err
}

// read returns the ranges in a file, one in a line.
func (u Users) read(path, separator string, parse func(fields []string) (idRange, error)) ([]idRange, error) {
	file, err := os.Open(filepath.Join(cmp.Or(u.Root, "/"), path))
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	var ranges []idRange
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		line := lines.Text()
		// Comments, and what asks for the users of NIS.
		if line == "" || strings.ContainsRune("#+-", rune(line[0])) {
			continue
		}
		fields := strings.Fields(line)
		if separator != "" {
			fields = strings.Split(line, separator)
		}
		r, err := parse(fields)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		ranges = append(ranges, r)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return ranges, nil
}

// maxLine is how long a line may be, in bytes: a group's lists its members.
const maxLine = 1 << 20

// rangeOf reads a range from fields: its first id, and how many, or one if that is negative.
func rangeOf(fields []string, first, count int) (r idRange, err error) {
	if len(fields) <= max(first, count) {
		return r, fmt.Errorf("unexpected text %q", fields)
	}
	if r.first, err = strconv.Atoi(fields[first]); err != nil {
		return r, err
	}
	r.count = 1
	if count >= 0 {
		r.count, err = strconv.Atoi(fields[count])
	}
	return r, err
}
