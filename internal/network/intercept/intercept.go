// Package intercept puts secrets into a guest's requests. The guest has a placeholder for each
// secret. Flows to a secret's host are taken apart here: TLS with the guest by a certificate of
// the VM's own authority, and TLS with the server, whose certificate is verified. In the headers
// of requests between the two, placeholders are replaced by what they stand for.
//
// What a guest sends is read by net/http and crypto/tls alone. The package knows nothing of how
// the guest is connected: it is given a connection of the guest, and a function that dials.
package intercept

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/smolvm/smolvm/internal/stream"
)

const (
	// MaxFlows is how many flows are intercepted at once. Each may take some 2 MiB, if guest
	// and server do what they can.
	MaxFlows = 64
	// handshakeTime is how long a flow may take until both handshakes are done.
	handshakeTime = 30 * time.Second
)

// Target is a server: its name, as DNS has it in lower case, and the TCP port.
type Target struct {
	Host string
	Port uint16
}

// String returns the target as an address to dial.
func (t Target) String() string { return net.JoinHostPort(t.Host, strconv.Itoa(int(t.Port))) }

// Secret is a value that takes the place of its placeholder in requests to its targets.
type Secret struct {
	Name, Placeholder, Value string
	Targets                  []Target
}

// placeholderPrefix begins all placeholders.
const placeholderPrefix = "smolvm_secret_"

// NewPlaceholder makes up a placeholder. It has letters, digits and underscores only, so it is
// the same in a URL, in JSON and in a shell.
func NewPlaceholder() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return placeholderPrefix + hex.EncodeToString(b[:])
}

// Options of an [Interceptor].
type Options struct {
	Secrets []Secret
	// Roots are the authorities by which servers are verified. Nil: the host's.
	Roots *x509.CertPool
	// Log tells of flows into which no secret is put, and why. Nil: nobody.
	Log *slog.Logger
}

// Interceptor puts the secrets of one VM into its flows. It has an authority of its own, whose
// key is in memory only. Its methods may be called at the same time as others.
type Interceptor struct {
	secrets   []Secret
	roots     *x509.CertPool
	log       *slog.Logger
	authority *authority
	buffers   bufferPool
	places    chan struct{} // has an element for each flow

	mu     sync.Mutex      // guards the following
	passed map[Target]bool // to which flows were carried as they are, and that was told
}

// New makes the interceptor of a VM, and its authority.
func New(opts Options) (*Interceptor, error) {
	var hosts []string
	for _, secret := range opts.Secrets {
		if secret.Placeholder == "" || secret.Value == "" || len(secret.Targets) == 0 {
			return nil, fmt.Errorf("secret %s: it has no placeholder, no value or no host", secret.Name)
		}
		for _, target := range secret.Targets {
			hosts = append(hosts, target.Host)
		}
	}
	slices.Sort(hosts)
	made, err := newAuthority(slices.Compact(hosts), time.Now)
	if err != nil {
		return nil, fmt.Errorf("make the VM's certificate authority: %w", err)
	}
	log := opts.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Interceptor{
		secrets: slices.Clone(opts.Secrets), roots: opts.Roots, log: log, authority: made,
		places: make(chan struct{}, MaxFlows), passed: map[Target]bool{},
	}, nil
}

// Certificate returns the certificate of the VM's authority, as PEM, for the guest to trust.
func (i *Interceptor) Certificate() []byte { return i.authority.pem() }

// HasPort reports whether a secret has a target with a port: such a flow's name is needed.
func (i *Interceptor) HasPort(port uint16) bool {
	return slices.ContainsFunc(i.secrets, func(s Secret) bool {
		return slices.ContainsFunc(s.Targets, func(t Target) bool { return t.Port == port })
	})
}

// Has reports whether a flow that states a name by TLS is to be given to [Interceptor.Carry].
func (i *Interceptor) Has(to Target) bool { return len(i.of(to)) > 0 }

// of returns the secrets for a target.
func (i *Interceptor) of(to Target) []Secret {
	to.Host = normal(to.Host)
	var found []Secret
	for _, secret := range i.secrets {
		if slices.Contains(secret.Targets, to) {
			found = append(found, secret)
		}
	}
	return found
}

// normal returns a name in the form in which names are compared.
func normal(name string) string { return strings.TrimSuffix(strings.ToLower(name), ".") }

// Flow is a flow that was let out.
type Flow struct {
	// To is the name that the guest states, and the port.
	To Target
	// Dial connects to the address that the guest wants, if it may still. It may be called
	// several times.
	Dial func(context.Context) (net.Conn, error)
	// Sent is called with the names of the secrets that a request gets, before it is sent.
	// Nil: nobody wants to know.
	Sent func(names []string)
}

// errFull is why a flow is broken off that is one too many.
var errFull = errors.New("the guest has too many connections to hosts of secrets")

// Carry carries a flow to its end, and closes the guest's connection. A server that can't be
// verified, or a guest that does not speak HTTP, gets what the other one sends as it is: no
// secret is put in, and it is between them whether they trust each other. The error is why the
// flow was broken off before it had begun.
func (i *Interceptor) Carry(ctx context.Context, guest net.Conn, to Flow) error {
	defer func() { _ = guest.Close() }()
	select {
	case i.places <- struct{}{}:
		defer func() { <-i.places }()
	default:
		abort(guest)
		return errFull
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { abort(guest) })()
	to.To.Host = normal(to.To.Host)
	f := &flow{Flow: to, of: i, secrets: i.of(to.To), guest: newGuestSide(guest)}
	defer f.closeUpstream()
	conn, err := f.handshake(ctx)
	switch {
	case err == nil:
		f.serve(ctx, conn)
		return nil
	case f.passes != nil:
		i.tellPassed(to.To, f.passes)
		return f.pass(ctx)
	}
	abort(guest)
	return fmt.Errorf("connection to %s: %w", to.To, err)
}

// tellPassed tells once for each target that a flow is carried as it is: the guest decides how
// often that happens.
func (i *Interceptor) tellPassed(to Target, why error) {
	i.mu.Lock()
	told := i.passed[to]
	i.passed[to] = true
	i.mu.Unlock()
	if !told {
		i.log.Warn("no secret is put into a connection", "to", to.String(), "why", why)
	}
}

// pass carries a flow as it is.
func (f *flow) pass(ctx context.Context) error {
	outside, err := f.Dial(ctx)
	if err != nil {
		abort(f.guest.Conn)
		return err
	}
	stream.Splice(ctx, f.guest.again(), outside)
	return nil
}
