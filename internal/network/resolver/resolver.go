// Package resolver answers the DNS questions of a guest as its host would answer its own.
package resolver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/smolvm/smolvm/internal/network"
)

const (
	// maxLookups bounds the names that are looked up at once, each of which costs the
	// host a socket or two.
	maxLookups = 64
	// lookupTimeout is longer than any resolver in a guest waits.
	lookupTimeout = 30 * time.Second
	// maxOverUDP is the longest answer over UDP, in bytes, whatever the guest would take.
	maxOverUDP = 4096
	// madeTTL is how long answers of our own may be kept, in seconds: not at all, as the
	// host's files may change.
	madeTTL = 0
)

// Resolver answers the guest's DNS questions: with what the host's hosts file says, and
// with what the host's name servers say, whatever the question and whatever the answer.
//
// If the guest has no IPv6, it is only told whether there is a name with such an address: some
// programs try it and give up. Who asks for signatures gets them all.
type Resolver struct {
	conf    hostFile[dns.ClientConfig]
	hosts   hostFile[hosts]
	mayKnow func(name string, addr netip.Addr) bool
	ipv6    bool
	policy  func() *network.Policy
	told    func(name string, answer []dns.RR)

	recorder network.Recorder

	ctx    context.Context
	cancel context.CancelFunc
	slots  chan struct{} // holds one for each lookup under way
	large  chan struct{} // holds one for each large answer that is being read
}

// Files are the host's files by which names are resolved.
type Files struct{ ResolvConf, Hosts string }

// HostFiles returns those that every program of the host uses; see resolv.conf(5) and
// hosts(5).
func HostFiles() Files { return Files{ResolvConf: "/etc/resolv.conf", Hosts: "/etc/hosts"} }

// Config is what a resolver needs to know.
type Config struct {
	// Files are read whenever they have changed.
	Files Files
	// MayKnow reports whether the guest may be told of an address from the hosts file.
	MayKnow func(name string, addr netip.Addr) bool
	// IPv6 reports that the guest has IPv6.
	IPv6 bool
	// Policy returns the egress policy in force. Nil: all names are resolved.
	Policy func() *network.Policy
	// Told is called with what the guest is told of a name, before it is. Nil: nobody is.
	Told func(name string, answer []dns.RR)
	// Recorder is told of each question and its answer. Nil: nobody is.
	Recorder network.Recorder
}

// New makes a resolver, which works until Close.
func New(config Config) *Resolver {
	r := &Resolver{
		conf:    hostFile[dns.ClientConfig]{path: config.Files.ResolvConf, parse: parseResolvConf},
		hosts:   hostFile[hosts]{path: config.Files.Hosts, parse: parseHosts},
		mayKnow: config.MayKnow,
		ipv6:    config.IPv6,
		policy:  config.Policy,
		told:    config.Told,

		recorder: config.Recorder,
		slots:    make(chan struct{}, maxLookups),
		large:    make(chan struct{}, maxLarge),
	}
	if r.policy == nil {
		r.policy = func() *network.Policy { return &network.Policy{} }
	}
	if r.recorder == nil {
		r.recorder = new(network.LateRecorder) // which forgets
	}
	if r.told == nil {
		r.told = func(string, []dns.RR) {}
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// Close ends the lookups under way.
func (r *Resolver) Close() error {
	r.cancel()
	return nil
}

// Search returns the domains that the host's own resolver searches for names at the moment.
func (r *Resolver) Search() []string { return r.conf.get().Search }

// errBusy means that there are too many lookups.
var errBusy = errors.New("too many names are being looked up")

// ServeDNS implements [dns.Handler].
func (r *Resolver) ServeDNS(w dns.ResponseWriter, query *dns.Msg) {
	size := dns.MaxMsgSize
	if _, overUDP := w.RemoteAddr().(*net.UDPAddr); overUDP {
		size = dns.MinMsgSize
		if options := query.IsEdns0(); options != nil {
			size = min(max(size, int(options.UDPSize())), maxOverUDP)
		}
	}
	answer, err := r.answer(query)
	if err != nil {
		answer = newReply(query, dns.RcodeServerFailure)
	}
	if len(query.Question) == 1 && !isLocalhost(query.Question[0].Name) {
		answer = permitted(*r.policy(), query, answer) // which may have been changed meanwhile
		r.told(query.Question[0].Name, answer.Answer)
	}
	r.record(query, answer)
	answer.Truncate(size)
	if w.WriteMsg(answer) != nil {
		// What came from outside can't be put into a message again.
		_ = w.WriteMsg(newReply(query, dns.RcodeServerFailure))
	}
}

// newReply is a reply without records.
func newReply(query *dns.Msg, rcode int) *dns.Msg {
	reply := new(dns.Msg).SetRcode(query, rcode)
	reply.RecursionAvailable = true
	reply.CheckingDisabled = query.CheckingDisabled
	if options := query.IsEdns0(); options != nil {
		reply.SetEdns0(maxOverUDP, options.Do())
	}
	return reply
}

// answer finds the answer to a query. An error means that nothing can be said.
func (r *Resolver) answer(query *dns.Msg) (*dns.Msg, error) {
	if len(query.Question) != 1 {
		return newReply(query, dns.RcodeFormatError), nil
	}
	question := query.Question[0]
	options := query.IsEdns0()
	switch {
	case options != nil && options.Version() != 0:
		return newReply(query, dns.RcodeBadVers), nil
	case question.Qclass != dns.ClassINET, question.Qtype == dns.TypeAXFR, question.Qtype == dns.TypeIXFR:
		return newReply(query, dns.RcodeNotImplemented), nil // what only makes sense of a server itself
	case !isLocalhost(question.Name) && !isPermitted(*r.policy(), question.Name):
		return blocked(query), nil
	}
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	default:
		return nil, errBusy
	}
	if records, known := r.local(question); known {
		reply := newReply(query, dns.RcodeSuccess)
		reply.Answer = records
		if len(records) == 0 {
			reply.Ns = []dns.RR{noSuch(question.Name, madeTTL)}
		}
		return reply, nil
	}
	ctx, cancel := context.WithTimeout(r.ctx, lookupTimeout)
	defer cancel()
	said, err := r.ask(ctx, query)
	if err != nil {
		return nil, err
	}
	return r.passOn(query, said), nil
}

// passOn makes a reply of what a name server said.
func (r *Resolver) passOn(query, said *dns.Msg) *dns.Msg {
	options := query.IsEdns0()
	if said.Rcode > 0xf && options == nil { // can't be said without EDNS
		return newReply(query, dns.RcodeServerFailure)
	}
	reply := newReply(query, said.Rcode)
	reply.Authoritative, reply.AuthenticatedData, reply.Truncated = said.Authoritative, said.AuthenticatedData, said.Truncated
	reply.Answer, reply.Ns = said.Answer, said.Ns
	theirs := said.IsEdns0() // before its place in the slice is cleared
	extra := slices.DeleteFunc(said.Extra, func(record dns.RR) bool { return record.Header().Rrtype == dns.TypeOPT })
	reply.Extra = append(extra, reply.Extra...)
	if theirs != nil && options != nil {
		for _, option := range theirs.Option {
			if option.Option() == dns.EDNS0EDE { // why it failed
				ours := reply.IsEdns0()
				ours.Option = append(ours.Option, option)
			}
		}
	}
	if !r.ipv6 && query.Question[0].Qtype == dns.TypeAAAA && (options == nil || !options.Do()) {
		withoutIPv6(reply)
	}
	return reply
}

// withoutIPv6 takes the addresses out of an answer. What is left says that there is such a
// name, and for how long that may be believed.
func withoutIPv6(reply *dns.Msg) {
	name, ttl := reply.Question[0].Name, uint32(0)
	removed := false
	reply.Answer = slices.DeleteFunc(reply.Answer, func(record dns.RR) bool {
		if record.Header().Rrtype != dns.TypeAAAA {
			return false
		}
		if !removed || record.Header().Ttl < ttl {
			name, ttl = record.Header().Name, record.Header().Ttl
		}
		removed = true
		return true
	})
	if removed {
		reply.Ns = []dns.RR{noSuch(name, ttl)}
	}
}

// noSuch is the record by which resolvers know how long they may remember that there is
// nothing (RFC 2308, section 3).
func noSuch(name string, ttl uint32) dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: ttl},
		Ns:  ".", Mbox: ".", Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: ttl,
	}
}

// local answers what the host knows for itself, and reports whether it does. An address
// that the guest may not have, as that of the host's own name, is not known.
func (r *Resolver) local(question dns.Question) ([]dns.RR, bool) {
	head := dns.RR_Header{Name: question.Name, Rrtype: question.Qtype, Class: dns.ClassINET, Ttl: madeTTL}
	name := strings.TrimSuffix(strings.ToLower(question.Name), ".")
	if addr, ok := reversed(name); ok {
		if question.Qtype != dns.TypePTR {
			return nil, false
		}
		var records []dns.RR
		for _, found := range r.namesOf(addr) {
			records = append(records, &dns.PTR{Hdr: head, Ptr: dns.Fqdn(found)})
		}
		return records, len(records) > 0
	}
	if isLocalhost(name) {
		if question.Qtype == dns.TypeA {
			return []dns.RR{&dns.A{Hdr: head, A: net.IPv4(127, 0, 0, 1)}}, true
		}
		return nil, true
	}
	if question.Qtype != dns.TypeA && question.Qtype != dns.TypeAAAA {
		return nil, false
	}
	var records []dns.RR
	known := false
	for _, addr := range r.hosts.get().addrs[name] {
		if !r.mayKnow(name, addr) {
			continue
		}
		known = true
		switch {
		case addr.Is4() && question.Qtype == dns.TypeA:
			records = append(records, &dns.A{Hdr: head, A: addr.AsSlice()})
		case addr.Is6() && question.Qtype == dns.TypeAAAA && r.ipv6:
			records = append(records, &dns.AAAA{Hdr: head, AAAA: addr.AsSlice()})
		}
	}
	return records, len(records) > 0 || known && question.Qtype == dns.TypeAAAA
}

// isLocalhost reports whether a name is one of the guest itself (RFC 6761, section 6.3).
func isLocalhost(name string) bool {
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	return name == "localhost" || strings.HasSuffix(name, ".localhost")
}

func (r *Resolver) namesOf(addr netip.Addr) []string {
	if addr == netip.AddrFrom4([4]byte{127, 0, 0, 1}) {
		return []string{"localhost"}
	}
	var names []string
	for _, name := range r.hosts.get().names[addr] {
		if r.mayKnow(name, addr) {
			names = append(names, name)
		}
	}
	return names
}

// reversed is the address of a name such as "1.2.0.192.in-addr.arpa".
func reversed(name string) (netip.Addr, bool) {
	digits, ok := strings.CutSuffix(name, ".in-addr.arpa")
	bytes := strings.Split(digits, ".")
	if !ok || len(bytes) != net.IPv4len {
		return netip.Addr{}, false
	}
	slices.Reverse(bytes)
	addr, err := netip.ParseAddr(strings.Join(bytes, "."))
	return addr, err == nil
}
