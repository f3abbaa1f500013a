package cli

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"unicode"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/size"
)

// parseMebibytes reads a size such as "512", "512M" or "2G", in MiB. Units are
// binary, however they are written.
func parseMebibytes(text string) (int64, error) {
	return size.ParseMebibytes(text)
}

// maxRange is how many ports one range may have: each costs a listener.
const maxRange = 1000

// parseForwards reads a port forward, or one for each port of a range:
// [[ADDR:]HOSTPORT:]GUESTPORT[/PROTOCOL].
func parseForwards(text string) ([]smolvm.PortForward, error) {
	malformed := fmt.Errorf("invalid port forward %q; use [[ADDR:]HOSTPORT:]GUESTPORT[/PROTOCOL], as in 8080:80, 8000-8010:8000-8010 or 5353:53/udp", text)
	rest, protocol, err := cutProtocol(text)
	if err != nil {
		return nil, fmt.Errorf("invalid port forward %q: %w", text, err)
	}
	host, guest, hasHost := cutLast(rest)
	if !hasHost {
		host, guest = "", rest
	}
	first, last, err := parsePorts(guest, 1)
	if err != nil {
		return nil, malformed
	}
	addr, hostPort, hasAddr := cutLast(host)
	if !hasAddr {
		addr, hostPort = "", host
	}
	var hostFirst, hostLast int // 0: any free port for each; so it is with "ADDR::GUESTPORT"
	if hostPort != "" {
		if hostFirst, hostLast, err = parsePorts(hostPort, 0); err != nil {
			return nil, malformed
		}
	}
	var hostAddr netip.Addr
	if hasAddr {
		if hostAddr, err = parseHostAddr(addr); err != nil {
			return nil, fmt.Errorf("invalid port forward %q: %w", text, err)
		}
	}
	switch count := last - first + 1; {
	case hostFirst != 0 && hostLast-hostFirst+1 != count:
		return nil, fmt.Errorf("invalid port forward %q: %d host ports for %d ports of the guest", text, hostLast-hostFirst+1, count)
	case count > maxRange:
		return nil, fmt.Errorf("invalid port forward %q: a range of %d ports; at most %d are allowed", text, count, maxRange)
	}
	var forwards []smolvm.PortForward
	for i := range last - first + 1 {
		forward := smolvm.PortForward{HostAddr: hostAddr, GuestPort: first + i, Protocol: protocol}
		if hostFirst != 0 {
			forward.HostPort = hostFirst + i
		}
		forwards = append(forwards, forward)
	}
	return forwards, nil
}

// cutProtocol cuts off what follows a slash; without, it is TCP.
func cutProtocol(text string) (rest string, protocol smolvm.Protocol, err error) {
	rest, name, found := strings.Cut(text, "/")
	switch protocol = smolvm.Protocol(strings.ToLower(name)); {
	case !found:
		return rest, smolvm.TCP, nil
	case protocol == smolvm.TCP, protocol == smolvm.UDP:
		return rest, protocol, nil
	}
	return "", "", fmt.Errorf("unknown protocol %q; use tcp or udp", name)
}

// parsePorts reads a port, or a range of them such as 8000-8010.
func parsePorts(text string, least int) (first, last int, err error) {
	from, to, isRange := strings.Cut(text, "-")
	if first, err = parsePort(from, least); err != nil || !isRange {
		return first, first, err
	}
	if last, err = parsePort(to, max(first, 1)); err == nil && first == 0 {
		err = fmt.Errorf("invalid port range %q", text)
	}
	return first, last, err
}

// parseHostAddr reads an address to listen on: an IP address, that of IPv6 in brackets, or
// localhost. That is 127.0.0.1 alone, as where no address is given.
func parseHostAddr(text string) (netip.Addr, error) {
	if strings.EqualFold(text, "localhost") {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1}), nil
	}
	addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(text, "["), "]"))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%q is not an IP address", text)
	}
	return addr, nil
}

// cutLast cuts at the last colon, which an IPv6 address in brackets may precede.
func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

func parsePort(text string, least int) (int, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || int(port) < least {
		return 0, fmt.Errorf("invalid port %q; use %d to 65535", text, least)
	}
	return int(port), nil
}

// parseDrive reads a drive: PATH, with :ro, :raw or :qcow2 after it, and the files that it is
// based on.
func parseDrive(text string) (smolvm.Drive, error) {
	parts := strings.Split(text, ",backing=")
	drive := smolvm.Drive{Path: parts[0]}
	for _, part := range parts[1:] {
		file, err := parseDiskFile(part)
		if err != nil {
			return smolvm.Drive{}, fmt.Errorf("invalid drive %q: backing %w", text, err)
		}
		drive.Backing = append(drive.Backing, file)
	}
	for {
		path, word, ok := cutLast(drive.Path)
		switch {
		case ok && word == "ro":
			drive.ReadOnly = true
		case ok && word == "rw":
		case ok && drive.Format == "" && (word == string(smolvm.FormatRaw) || word == string(smolvm.FormatQCOW2)):
			drive.Format = smolvm.DiskFormat(word)
		case drive.Path == "":
			return smolvm.Drive{}, fmt.Errorf("invalid drive %q; use PATH[:ro][:FORMAT], with ,backing=PATH:FORMAT for each file that it is based on", text)
		default:
			return drive, nil
		}
		drive.Path = path
	}
}

// parseDiskFile reads a file that a disk is based on: PATH:FORMAT.
func parseDiskFile(text string) (smolvm.DiskFile, error) {
	path, format, _ := cutLast(text)
	if path == "" || format != string(smolvm.FormatRaw) && format != string(smolvm.FormatQCOW2) {
		return smolvm.DiskFile{}, fmt.Errorf("%q has no format; use PATH:%s or PATH:%s", text, smolvm.FormatRaw, smolvm.FormatQCOW2)
	}
	return smolvm.DiskFile{Path: path, Format: smolvm.DiskFormat(format)}, nil
}

// parseEnv reads a variable: NAME=VALUE, or NAME for the one of our own
// environment.
func parseEnv(text string) (name, value string, err error) {
	name, value, ok := strings.Cut(text, "=")
	if name == "" {
		return "", "", fmt.Errorf("invalid variable %q: it has no name; use NAME=VALUE", text)
	}
	if strings.ContainsFunc(name, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
		return "", "", fmt.Errorf("invalid variable %q: there is a blank or a control character in its name", text)
	}
	if ok {
		return name, value, nil
	}
	value, ok = os.LookupEnv(name)
	if !ok {
		return "", "", fmt.Errorf("%s is not set here; use %s=VALUE", name, name)
	}
	return name, value, nil
}

// parseCopyArg reads an argument of cp: ID:PATH is a path in a guest, all else one of
// the host. A host's path with a colon in it can be written as ./PATH.
func parseCopyArg(text string) smolvm.CopyPath {
	before, after, ok := strings.Cut(text, ":")
	if !ok || strings.ContainsAny(before, "/.") || before == "" {
		return smolvm.CopyPath{Path: text}
	}
	return smolvm.CopyPath{VM: before, Path: after}
}
