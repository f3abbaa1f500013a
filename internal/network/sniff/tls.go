package sniff

import (
	"golang.org/x/crypto/cryptobyte"
)

// Of TLS (RFC 8446), its extensions (RFC 6066, RFC 9849), and the hello of SSL 2, with which
// a client may still begin TLS (RFC 5246, appendix E.2).
const (
	recordHandshake = 22
	recordHeader    = 5
	majorVersion    = 3
	clientHello     = 1
	handshakeHeader = 4

	extensionSNI  = 0
	extensionECH  = 0xfe0d
	extensionESNI = 0xffce // of drafts before ECH
	nameTypeHost  = 0

	sslv2Length = 0x80
)

// looksLikeTLS reports whether a server of TLS may take these bytes for the beginning of a
// client's.
func looksLikeTLS(first []byte) bool {
	return first[0] == recordHandshake || isSSLv2(first)
}

// isSSLv2 judges by as much of the hello as is there.
func isSSLv2(first []byte) bool {
	return first[0]&sslv2Length != 0 && (len(first) < 3 || first[2] == clientHello) &&
		(len(first) < 4 || first[3] == majorVersion)
}

// readTLS reads the SNI of a ClientHello, which may be in several records.
func readTLS(first []byte) (string, answer) {
	if first[0] != recordHandshake {
		if len(first) < 4 {
			return "", incomplete
		}
		return "", hidden // SSL 2 has no SNI
	}
	var hello []byte
	for {
		if len(first) < recordHeader {
			return "", incomplete
		}
		length := int(first[3])<<8 | int(first[4])
		if first[0] != recordHandshake || first[1] != majorVersion || length == 0 || length > Max {
			return "", hidden
		}
		part := first[recordHeader:min(recordHeader+length, len(first))]
		hello = append(hello, part...)
		if len(hello) >= handshakeHeader {
			if hello[0] != clientHello {
				return "", hidden
			}
			size := int(hello[1])<<16 | int(hello[2])<<8 | int(hello[3])
			if size > Max {
				return "", hidden
			}
			if len(hello) >= handshakeHeader+size {
				return readHello(hello[handshakeHeader : handshakeHeader+size])
			}
		}
		if len(part) < length {
			return "", incomplete
		}
		first = first[recordHeader+length:]
	}
}

// readHello reads the SNI of the body of a ClientHello. Values that are not known, as those
// by which clients see to it that servers ignore them (RFC 8701), are passed over.
func readHello(hello cryptobyte.String) (string, answer) {
	var session, suites, compressions, extensions cryptobyte.String
	const versionAndRandom = 2 + 32
	if !hello.Skip(versionAndRandom) || !hello.ReadUint8LengthPrefixed(&session) ||
		!hello.ReadUint16LengthPrefixed(&suites) || !hello.ReadUint8LengthPrefixed(&compressions) ||
		!hello.ReadUint16LengthPrefixed(&extensions) || !hello.Empty() {
		return "", hidden
	}
	name := ""
	for !extensions.Empty() {
		var kind uint16
		var body cryptobyte.String
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&body) {
			return "", hidden
		}
		switch kind {
		case extensionECH, extensionESNI:
			return "", hidden
		case extensionSNI:
			if name != "" {
				return "", hidden
			}
			if name = readServerName(body); name == "" {
				return "", hidden
			}
		}
	}
	if name == "" {
		return "", hidden
	}
	return name, stated
}

// readServerName returns the name in an extension; empty: there is none, or several.
func readServerName(body cryptobyte.String) string {
	var list, name cryptobyte.String
	var kind uint8
	if !body.ReadUint16LengthPrefixed(&list) || !body.Empty() ||
		!list.ReadUint8(&kind) || kind != nameTypeHost || !list.ReadUint16LengthPrefixed(&name) || !list.Empty() ||
		!isHost(string(name)) {
		return ""
	}
	return string(name)
}
