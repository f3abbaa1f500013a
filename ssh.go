package smolvm

import "strings"

// SSHOptions are the options of [Hosts.SSH].
type SSHOptions struct {
	// User to log in as. Empty: root.
	User string
	// KeyPath is the private key; a leading ~ is expanded. Empty: the data
	// directory's own key.
	KeyPath string
	// ProxyCommand is a command whose standard streams are a connection to the guest's port 22,
	// as ssh's option of the name takes it; Args connects by it then, in every network mode.
	ProxyCommand string
	// PublicHost is a name or address under which other hosts reach this one.
	PublicHost string
}

// SSHAccess is how the stock ssh client logs in to a VM. All vectors begin with "ssh", and
// a command may be appended to them. Those are nil that don't work in the VM's network mode.
type SSHAccess struct {
	// Args connects from the VM's own host, by the forwarded port. The guest's host key is
	// checked against the one that the VM was given.
	Args []string
	// PrivateArgs connects from the VM's own host to the guest's own address, in
	// [NetworkTAP].
	PrivateArgs []string
	// PublicArgs connects from other hosts. It is nil without [SSHOptions].PublicHost, and
	// works for VMs whose SSHHostAddr can be reached from there.
	PublicArgs []string
}

// String returns Args as a line for a shell.
func (a SSHAccess) String() string { return shellLine(a.Args) }

// Private returns PrivateArgs as a line for a shell.
func (a SSHAccess) Private() string { return shellLine(a.PrivateArgs) }

// Public returns PublicArgs as a line for a shell.
func (a SSHAccess) Public() string { return shellLine(a.PublicArgs) }

// sshJSON has the names of Python's SmolVM.
type sshJSON struct {
	PrivateIP     string `json:"private_ip,omitempty"`
	LocalhostPort string `json:"localhost_port,omitempty"`
	Public        string `json:"public,omitempty"`
}

// MarshalJSON implements [json.Marshaler]: "private_ip", "localhost_port" and "public" are
// lines for a shell.
func (a SSHAccess) MarshalJSON() ([]byte, error) {
	return encode(sshJSON{PrivateIP: a.Private(), LocalhostPort: a.String(), Public: a.Public()})
}

// shellLine quotes arguments for a POSIX shell.
func shellLine(args []string) string {
	quoted := make([]string, len(args))
	for i, arg := range args {
		quoted[i] = arg
		if arg == "" || strings.ContainsFunc(arg, isSpecial) {
			quoted[i] = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}

// isSpecial reports whether a shell may take a character for something else than itself.
func isSpecial(r rune) bool {
	return !strings.ContainsRune(letters+digits+"-_./:=@%+,", r)
}
