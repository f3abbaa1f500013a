// Package sniff reads the name that a TCP flow states in its first bytes: the SNI of TLS, or
// the Host of HTTP. What it reads is a guest's: it is bounded, and what can't be understood is
// a name that is hidden, never one that is missing.
package sniff

import (
	"bytes"
	"strings"

	"github.com/smolvm/smolvm/internal/network"
)

// Max is how many of a flow's first bytes are looked at. A name that is not stated in them is
// hidden.
const Max = 16 << 10

// First returns the names that a flow states in its first bytes. Done is false if more of them
// are needed, which it never is if the flow has ended, or [Max] bytes are there.
func First(first []byte, ended bool) (names network.Names, done bool) {
	ended = ended || len(first) >= Max
	if len(first) == 0 {
		return network.Names{}, ended
	}
	read := readHTTP
	if looksLikeTLS(first) {
		read = readTLS
	}
	name, answer := read(first)
	switch answer {
	case incomplete:
		return network.Names{Hidden: ended}, ended
	case hidden:
		return network.Names{Hidden: true}, true
	case stated:
		if looksLikeTLS(first) {
			return network.Names{SNI: name}, true
		}
		return network.Names{Host: name}, true
	case none:
	}
	return network.Names{}, true
}

// answer is what can be said of a flow's first bytes.
type answer int

const (
	// none is a protocol that states no name, as far as is known here.
	none answer = iota
	// incomplete are bytes that may be the beginning of what states a name.
	incomplete
	// hidden is a protocol that states a name, which can't be read.
	hidden
	// stated is a name that was read.
	stated
)

// readHTTP reads the Host of a request (RFC 9112). Servers are lenient, so what some of them
// might take for a Host of another name is hidden.
func readHTTP(first []byte) (string, answer) {
	first = bytes.TrimLeft(first, "\r\n") // see RFC 9112, section 2.2
	line, rest, whole := bytes.Cut(first, []byte("\n"))
	if bytes.ContainsFunc(line, func(c rune) bool { return c < ' ' && c != '\t' && c != '\r' || c >= 0x7f }) {
		return "", none
	}
	if !whole {
		return "", incomplete
	}
	fields := strings.Fields(string(line))
	if len(fields) < 2 || len(fields[len(fields)-1]) < len("HTTP/") ||
		!strings.EqualFold(fields[len(fields)-1][:len("HTTP/")], "HTTP/") {
		return "", none // or HTTP of before there was Host
	}
	if len(fields) != 3 || !strings.HasPrefix(fields[2], "HTTP/1.") { // HTTP/2 has names in its frames
		return "", hidden
	}
	name, answer := targetHost(fields[0], fields[1])
	if answer == hidden {
		return "", hidden
	}
	return readHeaders(rest, name, answer)
}

// readHeaders reads the Host of the lines after a request's first one, which has stated a
// target. Both must agree.
func readHeaders(rest []byte, target string, answer answer) (string, answer) {
	name, found := target, false
	for {
		line, after, whole := bytes.Cut(rest, []byte("\n"))
		if !whole {
			return "", incomplete
		}
		rest = after
		line = bytes.TrimSuffix(line, []byte("\r"))
		if len(line) == 0 {
			return name, answer
		}
		if line[0] == ' ' || line[0] == '\t' || bytes.ContainsAny(line, "\r\x00") {
			return "", hidden // a line that goes on another one (RFC 9112, section 5.2), or is none
		}
		key, value, _ := strings.Cut(string(line), ":")
		if !strings.EqualFold(strings.TrimSpace(key), "host") {
			continue
		}
		value = strings.Trim(value, " \t")
		if found || key != strings.TrimSpace(key) || !isHost(value) || target != "" && !strings.EqualFold(target, value) {
			return "", hidden
		}
		name, found, answer = value, true, stated
	}
}

// targetHost returns the host in the target of a request.
func targetHost(method, target string) (string, answer) {
	if strings.EqualFold(method, "CONNECT") {
		if !isHost(target) {
			return "", hidden
		}
		return target, stated
	}
	if strings.HasPrefix(target, "/") || target == "*" {
		return "", none
	}
	_, authority, ok := strings.Cut(target, "://")
	if i := strings.IndexAny(authority, "/?#"); i >= 0 {
		authority = authority[:i]
	}
	if !ok || !isHost(authority) {
		return "", hidden
	}
	return authority, stated
}

// isHost reports whether a text is a name or an address, with or without a port.
func isHost(text string) bool {
	return text != "" && !strings.ContainsFunc(text, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("-._:[]", c)
	})
}

// IsQUIC reports whether a datagram may be the first of a QUIC connection, of any version (RFC
// 9000, sections 14.1 and 17.2): its name can't be read.
func IsQUIC(datagram []byte) bool {
	const longHeader, shortest = 0x80, 1200
	return len(datagram) >= shortest && datagram[0]&longHeader != 0
}
