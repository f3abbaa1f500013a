package namespace

import (
	"io/fs"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// settings stands for a host's, by their paths.
type settings map[string]string

func (s settings) read(path string) ([]byte, error) {
	text, ok := s[strings.TrimPrefix(path, "/proc/sys/")]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return []byte(text + "\n"), nil
}

// Each cause has its words, and a way out.
func TestExplain(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		failure  failure
		settings settings
		root     bool
		why      string // empty: the failure says it itself
		hint     string
	}{
		"Debian's setting":               {failure{Step: stepClone, Errno: unix.EPERM}, settings{"kernel/unprivileged_userns_clone": "0"}, false, "kernel.unprivileged_userns_clone is 0", "sysctl -w kernel.unprivileged_userns_clone=1"},
		"no user namespaces allowed":     {failure{Step: stepClone, Errno: unix.ENOSPC}, settings{"user/max_user_namespaces": "0"}, false, "user.max_user_namespaces is 0", "sysctl -w user.max_user_namespaces="},
		"no network namespaces allowed":  {failure{Step: stepClone, Errno: unix.ENOSPC}, settings{"user/max_user_namespaces": "9", "user/max_net_namespaces": "0"}, false, "user.max_net_namespaces is 0", "sysctl -w user.max_net_namespaces="},
		"the same for root":              {failure{Step: stepClone, Errno: unix.ENOSPC}, settings{"user/max_net_namespaces": "0"}, true, "network namespaces are forbidden", "user.max_net_namespaces"},
		"AppArmor at the clone":          {failure{Step: stepClone, Errno: unix.EACCES}, settings{"kernel/apparmor_restrict_unprivileged_userns": "1"}, false, "AppArmor forbids", "userns,"},
		"AppArmor later":                 {failure{Step: StepInterface, Errno: unix.EPERM}, settings{"kernel/apparmor_restrict_unprivileged_userns": "1", "kernel/unprivileged_userns_clone": "1"}, false, "AppArmor forbids", "apparmor_restrict_unprivileged_userns=0"},
		"AppArmor, but it is the device": {failure{Step: StepInterface, Errno: unix.EACCES}, settings{"kernel/apparmor_restrict_unprivileged_userns": "1"}, false, "/dev/net/tun may not be used", "chmod 0666 /dev/net/tun"},
		"as many as there may be":        {failure{Step: stepClone, Errno: unix.ENOSPC}, settings{"user/max_user_namespaces": "5"}, false, "as many namespaces as are allowed", "max_*_namespaces"},
		"a kernel without them":          {failure{Step: stepClone, Errno: unix.EINVAL}, nil, false, "this kernel has no user namespaces", "as root"},
		"a container":                    {failure{Step: stepClone, Errno: unix.EPERM}, nil, false, "may not make user namespaces", "seccomp=unconfined"},
		"no device":                      {failure{Step: StepInterface, Errno: unix.ENOENT}, nil, false, "/dev/net/tun is not there", "modprobe tun"},
		"no module":                      {failure{Step: StepInterface, Errno: unix.ENODEV}, nil, true, "/dev/net/tun is not there", "modprobe tun"},
		"no permission":                  {failure{Step: StepInterface, Errno: unix.EACCES}, nil, false, "may not be used by this user", "chmod 0666"},
		"no bridges":                     {failure{Step: StepBridge, Errno: unix.EOPNOTSUPP}, nil, false, "this kernel has no bridges", "modprobe bridge"},
		"no launcher's program":          {failure{Step: stepClone, Errno: unix.ENOENT}, settings{"user/max_user_namespaces": "0"}, false, "", ""},
		"no command":                     {failure{Step: StepExecute, Errno: unix.EACCES}, settings{"kernel/apparmor_restrict_unprivileged_userns": "1"}, false, "", ""},
		"something else":                 {failure{Step: StepLink, Errno: unix.EIO}, nil, false, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hint, why := explainStep(&test.failure, host{read: test.settings.read, unprivileged: !test.root})
			switch {
			case test.why == "" && (why != nil || hint != ""):
				t.Errorf("it is explained by %v, %q", why, hint)
			case test.why != "" && (why == nil || !strings.Contains(why.Error(), test.why) || !strings.Contains(hint, test.hint)):
				t.Errorf("it is explained by %v, %q", why, hint)
			}
		})
	}
}
