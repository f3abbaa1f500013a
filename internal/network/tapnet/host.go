package tapnet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// CheckHost returns why this process can't connect VMs by TAP interfaces on this host, or to a
// bridge if that is not empty; the error has a hint. It changes nothing.
func CheckHost(bridge string) error {
	if bridge != "" {
		handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer handle.Close()
		if _, err := findBridge(handle, bridge); err != nil {
			return err
		}
	}
	// The kernel asks for the same privilege as for a change.
	conn, err := nftables.New()
	if err == nil {
		_, err = conn.ListTables()
	}
	if err != nil {
		return withHint(fmt.Errorf("use nftables: %w", err))
	}
	file, err := os.OpenFile("/dev/net/tun", os.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		if smolvm.HintOf(withHint(err)) == "" {
			err = &smolvm.Error{Hint: "run: modprobe tun, or use network mode user", Err: err}
		}
		return fmt.Errorf("make TAP interfaces: %w", withHint(err))
	}
	return file.Close()
}

// Collect removes what processes that are dead have left on the host of the VMs of a data
// directory: of one, or of all if that is empty. The error says which interfaces are left, if
// this process may not remove them; one that may not look, and finds none, has nothing to do.
func Collect(ctx context.Context, directory, vm string) ([]Owner, error) {
	dead := func(o Owner) bool {
		return o.Directory == directory && (vm == "" || o.VM == vm) && !o.Alive()
	}
	left, err := interfacesOf(dead)
	if err != nil {
		return nil, err
	}
	if vm != "" && len(left) == 0 {
		return nil, nil
	}
	removed, err := Reconcile(ctx, func(o Owner) bool { return !dead(o) })
	switch {
	case err == nil:
		return removed, nil
	case len(left) == 0 && (errors.Is(err, os.ErrPermission) || isNoNetfilter(err)):
		return nil, nil
	case len(left) > 0:
		err = fmt.Errorf("interfaces are left on the host: %s: %w", strings.Join(left, ", "), err)
	}
	if errors.Is(err, os.ErrPermission) {
		err = &smolvm.Error{Hint: "`smolvm reconcile`, with root or CAP_NET_ADMIN, removes what is left", Err: err}
	}
	return removed, err
}

// isNoNetfilter reports whether an error says that the kernel has no nftables.
func isNoNetfilter(err error) bool {
	return errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT)
}

// interfacesOf returns the names of the interfaces whose owners are chosen. It takes no
// privilege.
func interfacesOf(chosen func(Owner) bool) ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the host's interfaces: %w", err)
	}
	var names []string
	for _, link := range links {
		at := link.Attrs()
		if owner, ok := parseOwner(at.Alias); ok && strings.HasPrefix(at.Name, network.TAPPrefix) && chosen(owner) {
			names = append(names, at.Name)
		}
	}
	return names, nil
}
