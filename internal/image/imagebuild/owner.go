package imagebuild

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
	"github.com/smolvm/smolvm/internal/image/ociconfig"
)

// maxAccounts is how long a guest's /etc/passwd and /etc/group may be, in bytes.
const maxAccounts = 4 << 20

// owner is the user and the group who own a file.
type owner struct{ uid, gid uint32 }

// ownerOf finds out who USER[:GROUP] is, by the accounts of an image. A user's number alone is the
// group's too, as in docker, and a user's name alone has the group that the accounts say.
func ownerOf(tree files.Tree, text string) (owner, error) {
	user, err := ociconfig.ParseUser(text)
	if err != nil || text == "" {
		return owner{}, err
	}
	var found owner
	if user.Name != "" {
		if found, err = findUser(tree, user.Name); err != nil {
			return owner{}, err
		}
	}
	if user.Group == "" {
		return found, nil
	}
	found.gid, err = findGroup(tree, user.Group)
	return found, err
}

// findUser finds a user by name or number.
func findUser(tree files.Tree, name string) (owner, error) {
	if number, err := strconv.ParseUint(name, 10, 32); err == nil {
		return owner{uint32(number), uint32(number)}, nil
	}
	fields, err := findAccount(tree, "etc/passwd", name, 4)
	if err != nil {
		return owner{}, err
	}
	uid, uidErr := strconv.ParseUint(fields[2], 10, 32)
	gid, gidErr := strconv.ParseUint(fields[3], 10, 32)
	if uidErr != nil || gidErr != nil {
		return owner{}, fmt.Errorf("the image's /etc/passwd has no numbers for %q", name)
	}
	return owner{uint32(uid), uint32(gid)}, nil
}

func findGroup(tree files.Tree, name string) (uint32, error) {
	if number, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(number), nil
	}
	fields, err := findAccount(tree, "etc/group", name, 3)
	if err != nil {
		return 0, err
	}
	gid, err := strconv.ParseUint(fields[2], 10, 32)
	if err != nil {
		return 0, fmt.Errorf("the image's /etc/group has no number for %q", name)
	}
	return uint32(gid), nil
}

// findAccount finds the line of a name, which has so many fields at least.
func findAccount(tree files.Tree, file, name string, fields int) ([]string, error) {
	actual, _, err := files.Resolve(tree, file)
	var text []byte
	if err == nil {
		text, err = files.ReadSmall(tree, actual, maxAccounts)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		parts := strings.Split(strings.TrimRight(line, "\r\n"), ":")
		if parts[0] == name && len(parts) >= fields {
			return parts, nil
		}
	}
	return nil, fmt.Errorf("the image's /%s has no %q: give a number, or add it in a RUN before", file, name)
}
