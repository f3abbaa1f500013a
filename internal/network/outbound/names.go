package outbound

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
	// AskedGrace is how much longer than its TTL an answer is good for, as programs connect
	// some time after they have asked, and try again; of some answers the TTL is zero.
	AskedGrace = 30 * time.Second
	// maxTTL is how long an answer is good for at most.
	maxTTL = 24 * time.Hour
	// maxChain is how many aliases (CNAME) in a row are followed.
	maxChain = 16
)

// Names remembers for which names a guest was told an address, as long as it has been told
// that this may be kept. Its zero value is ready for use, by several goroutines at the same
// time.
type Names struct {
	mu    sync.Mutex // guards the following
	clock func() time.Time
	count int
	addrs map[netip.Addr]map[string]time.Time // until when
}

// SetClock has the time told by a function in place of [time.Now]. It is for tests.
func (a *Names) SetClock(clock func() time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.clock = clock
}

func (a *Names) now() time.Time {
	if a.clock == nil {
		return time.Now()
	}
	return a.clock()
}

// Of returns the names of an address, in any order.
func (a *Names) Of(addr netip.Addr) []string {
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

// Record remembers the addresses that an answer has for the name that was asked, itself or by
// aliases.
func (a *Names) Record(asked string, answer []dns.RR) {
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
					a.Add(addr.Unmap(), asked, time.Duration(record.Hdr.Ttl)*time.Second)
				}
			case *dns.AAAA:
				if addr, ok := netip.AddrFromSlice(record.AAAA); ok {
					a.Add(addr.Unmap(), asked, time.Duration(record.Hdr.Ttl)*time.Second)
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

// Add remembers an address of a name for the time to live of an answer.
func (a *Names) Add(addr netip.Addr, name string, ttl time.Duration) {
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	a.mu.Lock()
	defer a.mu.Unlock()
	until := a.now().Add(min(ttl, maxTTL) + AskedGrace)
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
	if a.addrs == nil {
		a.addrs = map[netip.Addr]map[string]time.Time{}
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
func (a *Names) shrink() {
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
