package cli

import (
	"fmt"
	"math"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/smolvm/smolvm"
)

// parseMebibytes reads a size such as "512", "512M" or "2G", in MiB. Units are
// binary, however they are written.
func parseMebibytes(text string) (int64, error) {
	upper := strings.ToUpper(text)
	digits := strings.TrimRight(upper, "BIKMGT")
	shift, ok := map[string]int{
		"": 0, "M": 0, "MB": 0, "MIB": 0,
		"G": 10, "GB": 10, "GIB": 10,
		"T": 20, "TB": 20, "TIB": 20,
	}[upper[len(digits):]]
	n, err := strconv.ParseInt(digits, 10, 64)
	if !ok || err != nil || n < 0 || n > math.MaxInt64>>20 {
		return 0, fmt.Errorf("%q is no size; use MiB, or a number with M, G or T", text)
	}
	return n << shift, nil
}

// parseForward reads a port forward: [[ADDR:]HOSTPORT:]GUESTPORT.
func parseForward(text string) (smolvm.PortForward, error) {
	malformed := fmt.Errorf("%q is no port forward; use [[ADDR:]HOSTPORT:]GUESTPORT, as in 8080:80", text)
	var forward smolvm.PortForward
	rest := strings.TrimSuffix(text, "/tcp")
	host, guest, ok := cutLast(rest)
	if !ok {
		host, guest = "", rest
	}
	port, err := parsePort(guest, 1)
	if err != nil {
		return forward, malformed
	}
	forward.GuestPort = port
	if host == "" {
		return forward, nil
	}
	addr, hostPort, ok := cutLast(host)
	if !ok {
		addr, hostPort = "", host
	}
	if hostPort != "" { // "ADDR::GUESTPORT": any free port of that address
		if forward.HostPort, err = parsePort(hostPort, 0); err != nil {
			return forward, malformed
		}
	}
	if ok {
		addr = strings.TrimSuffix(strings.TrimPrefix(addr, "["), "]")
		if forward.HostAddr, err = netip.ParseAddr(addr); err != nil {
			return forward, fmt.Errorf("%q: %q is no IP address", text, addr)
		}
	}
	return forward, nil
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
		return 0, fmt.Errorf("%q is no port; use %d to 65535", text, least)
	}
	return int(port), nil
}

// parseDrive reads a drive: PATH, with :ro, :raw or :qcow2 after it.
func parseDrive(text string) (smolvm.Drive, error) {
	drive := smolvm.Drive{Path: text}
	for {
		path, word, ok := cutLast(drive.Path)
		switch {
		case ok && word == "ro":
			drive.ReadOnly = true
		case ok && word == "rw":
		case ok && drive.Format == "" && (word == string(smolvm.FormatRaw) || word == string(smolvm.FormatQCOW2)):
			drive.Format = smolvm.DiskFormat(word)
		case drive.Path == "":
			return smolvm.Drive{}, fmt.Errorf("%q is no drive; use PATH[:ro][:FORMAT]", text)
		default:
			return drive, nil
		}
		drive.Path = path
	}
}

// parseEnv reads a variable: NAME=VALUE, or NAME for the one of our own
// environment.
func parseEnv(text string) (name, value string, err error) {
	name, value, ok := strings.Cut(text, "=")
	if name == "" {
		return "", "", fmt.Errorf("%q has no name; use NAME=VALUE", text)
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
func parseCopyArg(text string) (id, path string) {
	before, after, ok := strings.Cut(text, ":")
	if !ok || strings.ContainsAny(before, "/.") || before == "" {
		return "", text
	}
	if after == "" {
		after = "." // the home directory
	}
	return before, after
}
