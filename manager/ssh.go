package manager

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/store"
)

// SSH returns the argument vectors by which the stock ssh client logs in to the VM, by its
// SSH port. They check the guest's host key against the one that the VM was given, so no
// client has to be told to trust blindly; the key of a guest with a kernel of its own is
// learned at the first login. The port answers while the VM runs.
//
// The error matches [smolvm.ErrUnsupported] in network modes in which neither the guest's address
// nor a port of the host leads to it.
func (m *Manager) SSH(ctx context.Context, id string, opts smolvm.SSHOptions) (smolvm.SSHAccess, error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return smolvm.SSHAccess{}, err
	}
	fail := func(err error) (smolvm.SSHAccess, error) {
		return smolvm.SSHAccess{}, fmt.Errorf("SSH arguments of VM %q: %w", id, err)
	}
	if opts.ProxyCommand != "" {
		args, err := m.sshArgs(vm, opts)
		if err != nil {
			return fail(err)
		}
		return smolvm.SSHAccess{Args: append(args, "-o", "ProxyCommand="+opts.ProxyCommand, sshUser(opts)+"@"+hostKeyAlias(id))}, nil
	}
	if err := noForwards(vm); err != nil {
		return fail(err)
	}
	at, err := machine.Addresses(vm)
	if err != nil {
		return fail(err)
	}
	args, err := m.sshArgs(vm, opts)
	if err != nil {
		return fail(err)
	}
	port := strconv.Itoa(vm.SSHPort)
	access := smolvm.SSHAccess{Args: append(slices.Clone(args), "-p", port, sshUser(opts)+"@"+dialAddr(vm.Config.SSHHostAddr).String())}
	if at.Mode == smolvm.NetworkTAP {
		access.PrivateArgs = append(slices.Clone(args), sshUser(opts)+"@"+at.Guest.String())
	}
	if opts.PublicHost != "" {
		// The key file and the known_hosts file are on this host, so what another
		// host runs names neither, but for a key that the caller has named.
		access.PublicArgs = []string{"ssh"}
		if opts.KeyPath != "" {
			access.PublicArgs = append(access.PublicArgs, identityArgs(expandHome(opts.KeyPath))...)
		}
		access.PublicArgs = append(access.PublicArgs, "-p", port, sshUser(opts)+"@"+opts.PublicHost)
	}
	return access, nil
}

// sshArgs returns the arguments of ssh but for where the VM is.
func (m *Manager) sshArgs(vm store.VM, opts smolvm.SSHOptions) ([]string, error) {
	key := expandHome(opts.KeyPath)
	if key == "" {
		if _, err := m.clientSigner(); err != nil { // makes the key, if need be
			return nil, err
		}
		key = identity.ClientKeyPath(m.dir.Keys())
	}
	args := append([]string{"ssh"}, identityArgs(key)...)
	args = append(args, "-o", "IdentitiesOnly=yes")
	knownHosts, checking, err := m.knownHosts(vm)
	if err != nil {
		return nil, err
	}
	return append(args,
		"-o", "UserKnownHostsFile="+sshPath(knownHosts),
		"-o", "HostKeyAlias="+hostKeyAlias(vm.ID),
		"-o", "StrictHostKeyChecking="+checking), nil
}

func sshUser(o smolvm.SSHOptions) string {
	if o.User == "" {
		return "root"
	}
	return o.User
}

// dialAddr is an address to connect to for a listener on addr.
func dialAddr(addr netip.Addr) netip.Addr {
	switch {
	case !addr.IsUnspecified():
		return addr
	case addr.Is6():
		return netip.IPv6Loopback()
	default:
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
}

// hostKeyAlias names the VM in known_hosts; its port may change.
func hostKeyAlias(id string) string { return "smolvm-" + id }

// knownHosts returns the VM's known_hosts file, and how ssh is to use it. The key of a
// guest with a kernel of its own is not ours: ssh learns it at the first login, and
// insists on it from then on. Where no disk keeps it, each start has another.
func (m *Manager) knownHosts(vm store.VM) (path, checking string, _ error) {
	if vm.Config.UsesImage() {
		path, err := m.writeKnownHosts(vm)
		return path, "yes", err
	}
	name := "known_hosts"
	if vm.DiskPath == "" {
		name += "-" + vm.Run
	}
	if err := os.MkdirAll(m.vmDir(vm.ID), 0o700); err != nil {
		return "", "", fmt.Errorf("make directory for known_hosts: %w", err)
	}
	return filepath.Join(m.vmDir(vm.ID), name), "accept-new", nil
}

// writeKnownHosts writes the VM's known_hosts file, if it is not there yet. A VM's
// host key never changes.
func (m *Manager) writeKnownHosts(vm store.VM) (string, error) {
	path := filepath.Join(m.vmDir(vm.ID), "known_hosts")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	key, err := identity.PublicHostKey(vm.HostKey)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(m.vmDir(vm.ID), 0o700); err != nil {
		return "", fmt.Errorf("write known_hosts: %w", err)
	}
	line := hostKeyAlias(vm.ID) + " " + string(ssh.MarshalAuthorizedKey(key))
	temp, err := os.CreateTemp(m.vmDir(vm.ID), ".known_hosts-*")
	if err != nil {
		return "", fmt.Errorf("write known_hosts: %w", err)
	}
	_, writeErr := temp.WriteString(line)
	if err := errors.Join(writeErr, temp.Close()); err != nil {
		return "", errors.Join(fmt.Errorf("write known_hosts: %w", err), os.Remove(temp.Name()))
	}
	return path, os.Rename(temp.Name(), path)
}

// expandHome replaces a leading ~, which a shell would not do within quotes.
func expandHome(path string) string {
	rest, ok := strings.CutPrefix(path, "~/")
	if !ok {
		return path
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return path
	}
	return filepath.Join(home, rest)
}

// identityArgs make ssh log in with a key. Its -i looks for the file before it expands
// what follows a percent sign, and for another one after that.
func identityArgs(key string) []string {
	if strings.Contains(key, "%") {
		return []string{"-o", "IdentityFile=" + sshPath(key)}
	}
	return []string{"-i", key}
}

// sshPath is a path as the value of an option of ssh, which splits it into words and
// expands what follows a percent sign; see ssh_config(5).
func sshPath(path string) string {
	path = strings.ReplaceAll(path, "%", "%%")
	if !strings.ContainsAny(path, " \t\"'#\\") {
		return path
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(path) + `"`
}
