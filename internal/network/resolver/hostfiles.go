package resolver

import (
	"bytes"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// maxHostFile is how much is read of one of them, in bytes; lists of blocked names in
	// a hosts file are a few MB.
	maxHostFile = 16 << 20
	// maxServers is how many name servers are asked (MAXNS of resolv.conf(5)).
	maxServers = 3
	// maxSearch is how many domains a guest is given to search, and maxSearchLength how
	// long they are together: more than any resolver takes, and little in an answer.
	maxSearch, maxSearchLength = 32, 1024
)

// hostFile is a file of the host's that may change at any time, as when a laptop comes into
// another network.
type hostFile[T any] struct {
	path  string
	parse func([]byte) T

	mu       sync.Mutex // guards the following
	read     bool
	modified time.Time
	size     int64
	value    T
}

// get returns what the file says now. A file that can't be read says nothing.
func (f *hostFile[T]) get() T {
	f.mu.Lock()
	defer f.mu.Unlock()
	var modified time.Time
	size := int64(-1)
	if info, err := os.Stat(f.path); err == nil {
		modified, size = info.ModTime(), info.Size()
	}
	if f.read && modified.Equal(f.modified) && size == f.size {
		return f.value
	}
	f.read, f.modified, f.size = true, modified, size
	f.value = f.parse(readUpTo(f.path, maxHostFile))
	return f.value
}

func readUpTo(path string, limit int64) []byte {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer func() { _ = file.Close() }()
	text, _ := io.ReadAll(io.LimitReader(file, limit))
	return text
}

// parseResolvConf reads a resolv.conf(5). Without a name server in it, the one on the host
// itself is meant.
func parseResolvConf(text []byte) dns.ClientConfig {
	config, err := dns.ClientConfigFromReader(bytes.NewReader(text))
	if err != nil { // a line too long for it
		config = &dns.ClientConfig{Port: "53", Timeout: 5, Attempts: 2}
	}
	if len(config.Servers) == 0 {
		config.Servers = []string{"127.0.0.1"}
	}
	config.Servers = config.Servers[:min(len(config.Servers), maxServers)]
	config.Timeout = min(config.Timeout, int(lookupTimeout/time.Second))
	config.Attempts = min(config.Attempts, 5) // RES_MAXRETRY of the C library
	var search []string
	length := 0
	for _, domain := range config.Search {
		domain = strings.TrimSuffix(domain, ".")
		length += len(domain)
		if _, ok := dns.IsDomainName(domain); !ok || domain == "" || !isPlain(domain) {
			continue
		}
		if len(search) == maxSearch || length > maxSearchLength {
			break
		}
		search = append(search, domain)
	}
	config.Search = search
	return *config
}

// isPlain reports whether a domain has no characters but those that need no quoting in a
// file of any kind.
func isPlain(domain string) bool {
	for _, r := range domain {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("-._", r) {
			return false
		}
	}
	return true
}

// hosts is what a hosts(5) file says. Names are in lower case, without the last dot.
type hosts struct {
	addrs map[string][]netip.Addr
	names map[netip.Addr][]string
}

func parseHosts(text []byte) hosts {
	found := hosts{addrs: map[string][]netip.Addr{}, names: map[netip.Addr][]string{}}
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		addr, err := netip.ParseAddr(fields[0])
		if err != nil {
			continue
		}
		addr = addr.Unmap().WithZone("")
		for _, name := range fields[1:] {
			name = strings.TrimSuffix(strings.ToLower(name), ".")
			found.addrs[name] = append(found.addrs[name], addr)
			found.names[addr] = append(found.names[addr], name)
		}
	}
	return found
}
