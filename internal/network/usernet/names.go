package usernet

import (
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/smolvm/smolvm/internal/network/resolver"
)

const (
	// maxAsked is how many names of addresses are remembered for a guest, some 300 bytes
	// each; maxNamesOf how many of one address.
	maxAsked, maxNamesOf = 4096, 64
	// askedGrace is how much longer than its TTL an answer is good for, as programs connect
	// some time after they have asked, and try again; of some answers the TTL is zero.
	askedGrace = 30 * time.Second
	// maxTTL is how long an answer is good for at most.
	maxTTL = 24 * time.Hour
	// maxChain is how many aliases (CNAME) in a row are followed.
	maxChain = 16
)

// askedNames remembers for which names the guest was told an address, as long as it has been
// told that this may be kept.
type askedNames struct {
	mu    sync.Mutex // guards the following
	now   func() time.Time
	count int
	addrs map[netip.Addr]map[string]time.Time // until when
}

func newAskedNames() *askedNames {
	return &askedNames{now: time.Now, addrs: map[netip.Addr]map[string]time.Time{}}
}

// of returns the names of an address.
func (a *askedNames) of(addr netip.Addr) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var names []string
	now := a.now()
	for name, until := range a.addrs[addr] {
		if now.Before(until) {
			names = append(names, name)
		}
	}
	return names
}

// record remembers the addresses that an answer has for the name that was asked, itself or by
// aliases.
func (a *askedNames) record(asked string, answer []dns.RR) {
	if !resolver.IsComparable(asked) {
		return
	}
	owner := asked
	for range maxChain {
		next := ""
		for _, record := range answer {
			if !strings.EqualFold(record.Header().Name, owner) {
				continue
			}
			switch record := record.(type) {
			case *dns.A:
				if addr, ok := netip.AddrFromSlice(record.A); ok {
					a.add(addr.Unmap(), asked, time.Duration(record.Hdr.Ttl)*time.Second)
				}
			case *dns.CNAME:
				next = record.Target
			}
		}
		if owner = next; owner == "" {
			return
		}
	}
}

func (a *askedNames) add(addr netip.Addr, name string, ttl time.Duration) {
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	a.mu.Lock()
	defer a.mu.Unlock()
	until := a.now().Add(min(ttl, maxTTL) + askedGrace)
	names := a.addrs[addr]
	if before, known := names[name]; known {
		if before.Before(until) {
			names[name] = until
		}
		return
	}
	if len(names) >= maxNamesOf {
		return // until some of them are no longer valid
	}
	if a.count >= maxAsked {
		a.shrink()
	}
	if names = a.addrs[addr]; names == nil {
		names = map[string]time.Time{}
		a.addrs[addr] = names
	}
	names[name] = until
	a.count++
}

// shrink makes room for an eighth of all names: those that are no longer valid go, and then
// any. A guest that asks for so many has to ask again; it is let out no further by that.
func (a *askedNames) shrink() {
	now := a.now()
	drop := func(isToGo func(until time.Time) bool) {
		for addr, names := range a.addrs {
			for name, until := range names {
				if isToGo(until) {
					delete(names, name)
					a.count--
				}
			}
			if len(names) == 0 {
				delete(a.addrs, addr)
			}
		}
	}
	drop(func(until time.Time) bool { return !now.Before(until) })
	const enough = maxAsked - maxAsked/8
	drop(func(time.Time) bool { return a.count > enough })
}
