package resolver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	// upstreamSize is what a name server may answer over UDP, in bytes: what gets through
	// everywhere without fragments (dnsflagday.net/2020).
	upstreamSize = 1232
	// maxLarge bounds the answers over TCP that are read at once. One has up to 64 KiB,
	// and takes ten MB in memory if it is made for that.
	maxLarge = 4
	// impatience is how long a name server is waited for before the next is asked too.
	// What answers first is taken.
	impatience = time.Second
)

// ask asks the host's name servers a guest's question, and returns what they say. An error
// means that none has said anything.
func (r *Resolver) ask(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	config := r.conf.get()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		reply *dns.Msg
		err   error
	}
	tries := config.Attempts * len(config.Servers)
	results := make(chan result, tries)
	var best result
	for begun, ended := 0, 0; ended < tries; {
		var later <-chan time.Time
		if begun < tries {
			server := net.JoinHostPort(config.Servers[begun%len(config.Servers)], config.Port)
			go func() {
				ctx, cancel := context.WithTimeout(ctx, time.Duration(config.Timeout)*time.Second)
				defer cancel()
				reply, err := r.exchange(ctx, server, query)
				results <- result{reply, err}
			}()
			begun++
			later = time.After(impatience)
		}
		select {
		case got := <-results:
			ended++
			if got.err == nil && isFinal(got.reply.Rcode) {
				return got.reply, nil
			}
			if best.reply == nil {
				best = got
			}
		case <-later:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return best.reply, best.err
}

// isFinal reports whether an answer is one, and not that a server can't or won't give one:
// another may.
func isFinal(rcode int) bool {
	return rcode == dns.RcodeSuccess || rcode == dns.RcodeNameError
}

// exchange asks one name server.
func (r *Resolver) exchange(ctx context.Context, server string, query *dns.Msg) (*dns.Msg, error) {
	question := &dns.Msg{
		MsgHdr: dns.MsgHdr{
			RecursionDesired: query.RecursionDesired, CheckingDisabled: query.CheckingDisabled,
			AuthenticatedData: query.AuthenticatedData,
		},
		Question: query.Question,
	}
	options := query.IsEdns0()
	question.SetEdns0(upstreamSize, options != nil && options.Do())
	reply, err := r.exchangeOnce(ctx, "udp", server, question)
	if err == nil && (reply.Rcode == dns.RcodeFormatError || reply.Rcode == dns.RcodeNotImplemented) {
		question.Extra = nil // a server that does not know of EDNS
		reply, err = r.exchangeOnce(ctx, "udp", server, question)
	}
	if err != nil || !reply.Truncated {
		return reply, err
	}
	select {
	case r.large <- struct{}{}:
		defer func() { <-r.large }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	whole, err := r.exchangeOnce(ctx, "tcp", server, question)
	if err != nil {
		return reply, nil // better than nothing, and it says that there is more
	}
	return whole, nil
}

func (r *Resolver) exchangeOnce(ctx context.Context, network, server string, question *dns.Msg) (*dns.Msg, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, network, server)
	if err != nil {
		return nil, fmt.Errorf("ask name server: %w", err)
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	question.Id = dns.Id()
	client := dns.Client{Timeout: lookupTimeout}
	reply, _, err := client.ExchangeWithConnContext(ctx, question, &dns.Conn{Conn: conn})
	if err != nil {
		return nil, fmt.Errorf("ask name server %s: %w", server, err)
	}
	if !isReplyTo(reply, question.Question[0]) {
		return nil, errors.New("ask name server " + server + ": its answer is to another question")
	}
	return reply, nil
}

func isReplyTo(reply *dns.Msg, question dns.Question) bool {
	if !reply.Response || reply.Opcode != dns.OpcodeQuery {
		return false
	}
	if len(reply.Question) == 0 { // as in some errors
		return !isFinal(reply.Rcode)
	}
	got := reply.Question[0]
	return len(reply.Question) == 1 && strings.EqualFold(got.Name, question.Name) &&
		got.Qtype == question.Qtype && got.Qclass == question.Qclass
}
