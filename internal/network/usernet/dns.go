package usernet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	// maxLookups bounds the names that are looked up at once, each of which costs the
	// host a socket or two.
	maxLookups = 64
	// lookupTimeout is longer than any resolver in a guest waits.
	lookupTimeout = 30 * time.Second
)

// resolver answers the guest's DNS questions with what the host finds out for itself,
// by its hosts file and its own name servers.
type resolver struct {
	host   net.Resolver
	ctx    context.Context
	cancel context.CancelFunc
	slots  chan struct{} // holds one for each lookup under way
}

func newResolver() *resolver {
	r := &resolver{slots: make(chan struct{}, maxLookups)}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// Close ends the lookups under way.
func (r *resolver) Close() error {
	r.cancel()
	return nil
}

// ServeDNS implements [dns.Handler].
func (r *resolver) ServeDNS(w dns.ResponseWriter, query *dns.Msg) {
	answer := new(dns.Msg).SetReply(query)
	answer.RecursionAvailable = true
	size := dns.MaxMsgSize
	if _, overUDP := w.RemoteAddr().(*net.UDPAddr); overUDP {
		size = dns.MinMsgSize
	}
	if options := query.IsEdns0(); options != nil {
		size = max(size, int(options.UDPSize()))
		answer.SetEdns0(uint16(size), false)
	}
	for _, question := range query.Question {
		records, err := r.lookup(question)
		answer.Answer = append(answer.Answer, records...)
		if err != nil {
			answer.Rcode = rcode(question, err)
		}
	}
	answer.Truncate(size)
	_ = w.WriteMsg(answer)
}

// rcode says what came of a question. Only a name without an address is said not to
// exist: for other types, the host does not tell "no such name" from "no such record".
func rcode(question dns.Question, err error) int {
	failed, ok := errors.AsType[*net.DNSError](err)
	switch {
	case !ok || !failed.IsNotFound:
		return dns.RcodeServerFailure
	case question.Qtype == dns.TypeA:
		return dns.RcodeNameError
	}
	return dns.RcodeSuccess
}

// errBusy says that there are too many lookups.
var errBusy = errors.New("too many names are being looked up")

// lookup answers one question, as far as the host can tell. Of other types there is
// nothing: the guest has no IPv6, so it needs no AAAA.
func (r *resolver) lookup(question dns.Question) ([]dns.RR, error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	default:
		return nil, errBusy
	}
	ctx, cancel := context.WithTimeout(r.ctx, lookupTimeout)
	defer cancel()
	name := question.Name
	head := func() dns.RR_Header {
		return dns.RR_Header{Name: name, Rrtype: question.Qtype, Class: dns.ClassINET} // not to be kept: the host knows when to ask again
	}
	switch question.Qtype {
	case dns.TypeA:
		found, err := r.host.LookupNetIP(ctx, "ip4", hostName(name))
		return records(found, func(ip netip.Addr) dns.RR { return &dns.A{Hdr: head(), A: ip.AsSlice()} }), err
	case dns.TypePTR:
		found, err := r.host.LookupAddr(ctx, reversed(name))
		return records(found, func(n string) dns.RR { return &dns.PTR{Hdr: head(), Ptr: dns.Fqdn(n)} }), err
	case dns.TypeCNAME:
		found, err := r.host.LookupCNAME(ctx, name)
		if err != nil || found == name {
			return nil, err
		}
		return []dns.RR{&dns.CNAME{Hdr: head(), Target: found}}, nil
	case dns.TypeMX:
		found, err := r.host.LookupMX(ctx, name)
		return records(found, func(mx *net.MX) dns.RR { return &dns.MX{Hdr: head(), Preference: mx.Pref, Mx: mx.Host} }), err
	case dns.TypeNS:
		found, err := r.host.LookupNS(ctx, name)
		return records(found, func(ns *net.NS) dns.RR { return &dns.NS{Hdr: head(), Ns: ns.Host} }), err
	case dns.TypeTXT:
		found, err := r.host.LookupTXT(ctx, name)
		return records(found, func(text string) dns.RR { return &dns.TXT{Hdr: head(), Txt: chunks(text)} }), err
	case dns.TypeSRV:
		_, found, err := r.host.LookupSRV(ctx, "", "", name)
		return records(found, func(srv *net.SRV) dns.RR {
			return &dns.SRV{Hdr: head(), Priority: srv.Priority, Weight: srv.Weight, Port: srv.Port, Target: srv.Target}
		}), err
	}
	return nil, nil
}

func records[T any](found []T, record func(T) dns.RR) []dns.RR {
	var all []dns.RR
	for _, one := range found {
		all = append(all, record(one))
	}
	return all
}

// hostName is the name as Go's resolver wants it. In questions names end with a dot;
// with that, Go does not find a name of one label in the hosts file.
func hostName(name string) string {
	if label := strings.TrimSuffix(name, "."); !strings.Contains(label, ".") {
		return label
	}
	return name
}

// reversed is the address of a name such as "1.2.0.192.in-addr.arpa."; empty if it is
// none.
func reversed(name string) string {
	digits, ok := strings.CutSuffix(strings.ToLower(name), ".in-addr.arpa.")
	bytes := strings.Split(digits, ".")
	if !ok || len(bytes) != net.IPv4len {
		return ""
	}
	return strings.Join([]string{bytes[3], bytes[2], bytes[1], bytes[0]}, ".")
}

// chunks cuts a text into strings as short as TXT records hold (RFC 1035, section
// 3.3.14).
func chunks(text string) []string {
	const longest = 255
	var all []string
	for len(text) > longest {
		all, text = append(all, text[:longest]), text[longest:]
	}
	return append(all, text)
}
