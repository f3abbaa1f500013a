package usernet

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"
)

const (
	// maxLookups bounds the names that are looked up at once, each of which costs the
	// host a socket or two.
	maxLookups = 64
	// lookupTimeout is longer than any resolver in a guest waits.
	lookupTimeout = 30 * time.Second
)

var errBusy = errors.New("too many names are being looked up")

// resolver looks names up for the guest as the host does for itself.
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

// lookup runs one lookup within the limits. The DNS server's own context has none.
func lookup[T any](r *resolver, do func(context.Context) (T, error)) (T, error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	default:
		var none T
		return none, errBusy
	}
	ctx, cancel := context.WithTimeout(r.ctx, lookupTimeout)
	defer cancel()
	return do(ctx)
}

func (r *resolver) LookupIPAddr(_ context.Context, name string) ([]net.IPAddr, error) {
	// Names come with a dot at the end. With it, Go does not find a name of one label
	// in /etc/hosts.
	if label := strings.TrimSuffix(name, "."); !strings.Contains(label, ".") {
		name = label
	}
	return lookup(r, func(ctx context.Context) ([]net.IPAddr, error) { return r.host.LookupIPAddr(ctx, name) })
}

func (r *resolver) LookupCNAME(_ context.Context, name string) (string, error) {
	return lookup(r, func(ctx context.Context) (string, error) { return r.host.LookupCNAME(ctx, name) })
}

func (r *resolver) LookupMX(_ context.Context, name string) ([]*net.MX, error) {
	return lookup(r, func(ctx context.Context) ([]*net.MX, error) { return r.host.LookupMX(ctx, name) })
}

func (r *resolver) LookupNS(_ context.Context, name string) ([]*net.NS, error) {
	return lookup(r, func(ctx context.Context) ([]*net.NS, error) { return r.host.LookupNS(ctx, name) })
}

func (r *resolver) LookupTXT(_ context.Context, name string) ([]string, error) {
	return lookup(r, func(ctx context.Context) ([]string, error) { return r.host.LookupTXT(ctx, name) })
}

func (r *resolver) LookupSRV(_ context.Context, service, proto, name string) (string, []*net.SRV, error) {
	var canonical string
	records, err := lookup(r, func(ctx context.Context) (records []*net.SRV, err error) {
		canonical, records, err = r.host.LookupSRV(ctx, service, proto, name)
		return records, err
	})
	return canonical, records, err
}
