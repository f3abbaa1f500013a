package guest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// defaultPath is where commands are looked for, as in Debian's /etc/login.defs.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// account is a user of the guest.
type account struct {
	name, home, shell string
	uid, gid          uint32
	onlyGroup         bool // without supplementary groups, as gid was asked for
}

// superuser is there even in an image without /etc/passwd.
var superuser = account{name: "root", home: "/root", shell: "/bin/sh"}

// Bounds of the files that accounts are in, and of a line there, in bytes: a group may have
// thousands of members.
const maxAccounts, maxAccount = 16 << 20, 1 << 20

// accounts is a file that accounts are in.
type accounts struct {
	io.Reader
	io.Closer
}

// openAccounts opens such a file. Images have them as they like: what is no file would be waited
// for without end, and a file may have any length.
func openAccounts(path string) (accounts, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return accounts{}, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file", path)
	}
	if err != nil {
		_ = file.Close()
		return accounts{}, err
	}
	return accounts{io.LimitReader(file, maxAccounts), file}, nil
}

func scanLines(r io.Reader) *bufio.Scanner {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxAccount)
	return lines
}

// findAccount looks a user up by name.
func findAccount(name string) (account, error) {
	if name == "" {
		name = superuser.name
	}
	file, err := openAccounts("/etc/passwd")
	if err == nil {
		defer func() { _ = file.Close() }()
		if found, ok := parsePasswd(file, name); ok {
			return found, nil
		}
	}
	if name == superuser.name {
		return superuser, nil
	}
	return account{}, fmt.Errorf("no user %q in the guest", name)
}

// ownAccount returns the account that the agent runs as: root's, except in tests.
func ownAccount() (account, error) {
	if uid := os.Getuid(); uid != 0 {
		return findUID(uint32(uid)), nil
	}
	return findAccount(superuser.name)
}

// findUser looks up NAME, UID, or either with :GROUP or :GID after it, as docker exec has
// them. A UID need not be in /etc/passwd.
func findUser(text string) (account, error) {
	name, group, hasGroup := strings.Cut(text, ":")
	user, err := findAccount(name)
	if uid, parseErr := strconv.ParseUint(name, 10, 32); err != nil && parseErr == nil {
		if user, err = findUID(uint32(uid)), nil; user.name == "" {
			user = account{name: name, uid: uint32(uid), home: "/", shell: superuser.shell}
		}
	}
	if err != nil || !hasGroup {
		return user, err
	}
	user.onlyGroup = true
	if gid, parseErr := strconv.ParseUint(group, 10, 32); parseErr == nil {
		user.gid = uint32(gid)
		return user, nil
	}
	file, err := openAccounts("/etc/group")
	if err == nil {
		defer func() { _ = file.Close() }()
		var found bool
		if user.gid, found = parseGID(file, group); found {
			return user, nil
		}
	}
	return account{}, fmt.Errorf("no group %q in the guest", group)
}

// findUID looks a user up by number; without a name if there is none.
func findUID(uid uint32) account {
	file, err := openAccounts("/etc/passwd")
	if err != nil {
		return account{}
	}
	defer func() { _ = file.Close() }()
	lines := scanLines(file)
	for lines.Scan() {
		name, _, _ := strings.Cut(lines.Text(), ":")
		if user, ok := parsePasswd(strings.NewReader(lines.Text()), name); ok && user.uid == uid {
			return user
		}
	}
	return account{}
}

// parseGID finds the number of a group in the text of /etc/group.
func parseGID(r io.Reader, name string) (uint32, bool) {
	lines := scanLines(r)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) != 4 || fields[0] != name {
			continue
		}
		if gid, err := strconv.ParseUint(fields[2], 10, 32); err == nil {
			return uint32(gid), true
		}
	}
	return 0, false
}

// parsePasswd finds a user in the text of /etc/passwd; see passwd(5). A line that
// makes no sense is passed over.
func parsePasswd(r io.Reader, name string) (account, bool) {
	lines := scanLines(r)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) != 7 || fields[0] != name {
			continue
		}
		uid, uidErr := strconv.ParseUint(fields[2], 10, 32)
		gid, gidErr := strconv.ParseUint(fields[3], 10, 32)
		if uidErr != nil || gidErr != nil {
			continue
		}
		found := account{name: name, uid: uint32(uid), gid: uint32(gid), home: fields[5], shell: fields[6]}
		if found.home == "" {
			found.home = "/"
		}
		if found.shell == "" {
			found.shell = superuser.shell
		}
		return found, true
	}
	return account{}, false
}

// parseGroups finds the supplementary groups of a user in the text of /etc/group.
func parseGroups(r io.Reader, name string) []uint32 {
	var gids []uint32
	lines := scanLines(r)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) != 4 {
			continue
		}
		for member := range strings.SplitSeq(fields[3], ",") {
			if gid, err := strconv.ParseUint(fields[2], 10, 32); err == nil && member == name {
				gids = append(gids, uint32(gid))
			}
		}
	}
	return gids
}

// credential returns the ids that a process of the user runs under; nil if they are the
// agent's own.
func (a account) credential() *syscall.Credential {
	if int(a.uid) == os.Getuid() && int(a.gid) == os.Getgid() {
		return nil
	}
	credential := &syscall.Credential{Uid: a.uid, Gid: a.gid}
	if file, err := openAccounts("/etc/group"); err == nil && !a.onlyGroup {
		credential.Groups = parseGroups(file, a.name)
		_ = file.Close()
	}
	return credential
}

// environment returns the variables that every command of the user has.
func (a account) environment() []string {
	return []string{
		"PATH=" + defaultPath,
		"HOME=" + a.home,
		"USER=" + a.name,
		"LOGNAME=" + a.name,
		"SHELL=" + a.shell,
	}
}
