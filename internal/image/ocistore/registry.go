package ocistore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociref"
)

// Waits and bounds of requests to a registry.
const (
	// maxAttempts is how often something is tried that brings nothing new.
	maxAttempts = 6
	// firstBackoff is the wait after the first of them, which doubles, up to maxBackoff;
	// maxRetryAfter bounds the wait that a registry asks for.
	firstBackoff, maxBackoff, maxRetryAfter = 200 * time.Millisecond, 10 * time.Second, time.Minute
	// stallTimeout is how long a registry may send nothing.
	stallTimeout = time.Minute
	// maxRedirects is how often a request may be sent elsewhere.
	maxRedirects = 10
)

// remote is a repository of a registry.
type remote struct {
	ref    ociref.Ref
	client *http.Client
	stall  time.Duration
	wait   func(ctx context.Context, d time.Duration) error
}

// Access says how registries are reached. The zero value is how docker and podman reach them.
type Access struct {
	// Keychain has the credentials. Nil: those of docker's and podman's configuration.
	Keychain authn.Keychain
	// Transport sends the requests. Nil: a transport with timeouts, through the proxy that
	// the environment names.
	Transport http.RoundTripper
	// Stall is how long a registry may send nothing. Zero: one minute.
	Stall time.Duration
	// Backoff replaces the waits between attempts, for tests. Nil: growing ones.
	Backoff func(ctx context.Context, d time.Duration) error
}

// newRemote connects to a registry, and logs in there.
func newRemote(ctx context.Context, ref ociref.Ref, access Access) (*remote, error) {
	r := &remote{ref: ref, stall: access.Stall, wait: access.Backoff}
	if r.stall == 0 {
		r.stall = stallTimeout
	}
	if r.wait == nil {
		r.wait = sleep
	}
	keychain := access.Keychain
	if keychain == nil {
		keychain = authn.DefaultKeychain
	}
	base := access.Transport
	if base == nil {
		base = newTransport()
	}
	server, err := ref.Server()
	if err != nil {
		return nil, err
	}
	repository := server.Repo(ref.Repository)
	credentials, err := authn.Resolve(ctx, keychain, repository)
	if err != nil {
		return nil, fmt.Errorf("read credentials for %s: %w", ref.Registry, err)
	}
	base = guard{base, isLoopback(ref.Registry)}
	var trip http.RoundTripper
	err = r.try(ctx, func(context.Context) (bool, error) {
		trip, err = transport.NewWithContext(ctx, server, credentials, base, []string{repository.Scope(transport.PullScope)})
		var dns *net.DNSError
		if errors.As(err, &dns) || errors.Is(err, syscall.ECONNREFUSED) {
			err = &firstContactError{err}
		}
		return false, err
	})
	if err != nil {
		return nil, r.explain(err)
	}
	r.client = &http.Client{Transport: trip, CheckRedirect: func(_ *http.Request, via []*http.Request) error {
		if len(via) >= maxRedirects {
			return errRedirects
		}
		return nil
	}}
	return r, nil
}

var (
	errRedirects = errors.New("the registry sends requests from one place to the next")
	errStalled   = errors.New("the registry has sent nothing for too long")
	errPlain     = errors.New("plain http is for registries on loopback: this one, or where it sends us, has no https")
)

func newTransport() *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		ForceAttemptHTTP2:     true,
		MaxIdleConns:          16,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       30 * time.Second,
		TLSHandshakeTimeout:   15 * time.Second,
		ResponseHeaderTimeout: stallTimeout,
	}
}

// isLoopback reports whether a registry's host is this one.
func isLoopback(registry string) bool {
	host := registry
	if h, _, err := net.SplitHostPort(registry); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// guard sends no request without TLS but to loopback, and that only for a registry that is
// there: one elsewhere can't send us to the services of this host, nor read credentials off
// the wire.
type guard struct {
	http.RoundTripper
	loopback bool
}

func (g guard) RoundTrip(request *http.Request) (*http.Response, error) {
	if local := isLoopback(request.URL.Host); local && !g.loopback || request.URL.Scheme != "https" && !local {
		return nil, errPlain
	}
	return g.RoundTripper.RoundTrip(request)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// statusError is an answer of a registry that is none of the expected.
type statusError struct {
	error
	status int
	after  time.Duration // which the registry asks to wait
}

func (e *statusError) Unwrap() error { return e.error }

// checkStatus returns the error that an answer is, unless it has one of the codes.
func checkStatus(response *http.Response, codes ...int) error {
	err := transport.CheckError(response, codes...)
	if err == nil {
		return nil
	}
	seconds, _ := strconv.Atoi(response.Header.Get("Retry-After"))
	return &statusError{err, response.StatusCode, min(max(0, time.Duration(min(seconds, 3600))*time.Second), maxRetryAfter)}
}

// statusOf returns the status code that an error is of, or 0.
func statusOf(err error) int {
	var ours *statusError
	var theirs *transport.Error
	switch {
	case errors.As(err, &ours):
		return ours.status
	case errors.As(err, &theirs):
		return theirs.StatusCode
	}
	return 0
}

// firstContactError is the error of a registry that was not reached at all. Later it may pass, but
// who has mistyped a name is not kept waiting.
type firstContactError struct{ error }

func (e *firstContactError) Unwrap() error { return e.error }

// isTemporary reports whether an attempt may succeed later.
func isTemporary(err error) bool {
	var digest *DigestError
	var dns *net.DNSError
	var first *firstContactError
	switch status := statusOf(err); {
	case status == http.StatusTooManyRequests, status == http.StatusRequestTimeout, status >= 500:
		return true
	case status != 0, errors.Is(err, errPlain), errors.Is(err, errRedirects), errors.As(err, &digest), errors.As(err, &first),
		errors.As(err, &dns) && dns.IsNotFound, errors.Is(err, context.Canceled):
		return false
	case errors.Is(err, errStalled), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return true
	}
	var network net.Error
	var wrapped *url.Error
	return errors.As(err, &network) || errors.As(err, &wrapped)
}

// try makes attempts until one succeeds, fails for good, or brings nothing new too often.
func (r *remote) try(ctx context.Context, attempt func(ctx context.Context) (progress bool, err error)) error {
	wait := firstBackoff
	for failed := 0; ; {
		progress, err := attempt(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if failed++; progress {
			failed, wait = 0, firstBackoff
		}
		if !isTemporary(err) || failed >= maxAttempts {
			return err
		}
		pause := wait
		if status, ok := errors.AsType[*statusError](err); ok {
			pause = max(pause, status.after)
		}
		if err := r.wait(ctx, pause); err != nil {
			return err
		}
		wait = min(2*wait, maxBackoff)
	}
}

// get sends a request, and hands the answer over while it comes. When nothing comes any more,
// it ends.
func (r *remote) get(ctx context.Context, kind, name string, header http.Header, use func(*http.Response, io.Reader) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(r.stall, func() { cancel(errStalled) })
	defer stalled.Stop()
	address := url.URL{Scheme: "https", Host: r.host(), Path: "/v2/" + r.ref.Repository + "/" + kind + "/" + name}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address.String(), nil)
	if err != nil {
		return err
	}
	request.Header = header
	response, err := r.client.Do(request)
	if err != nil {
		return causeOf(ctx, err)
	}
	defer func() { _ = response.Body.Close() }()
	return causeOf(ctx, use(response, watched{response.Body, func() { stalled.Reset(r.stall) }}))
}

// host returns the host of the registry's server.
func (r *remote) host() string {
	server, err := r.ref.Server()
	if err != nil {
		return r.ref.Registry
	}
	return server.RegistryStr()
}

// causeOf returns why a context ended, if an error is of that.
func causeOf(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// watched is a reader that tells whenever something comes.
type watched struct {
	io.Reader
	came func()
}

func (w watched) Read(b []byte) (int, error) {
	n, err := w.Reader.Read(b)
	if n > 0 {
		w.came()
	}
	return n, err
}

// manifest returns a manifest or an index, by a tag or a digest.
func (r *remote) manifest(ctx context.Context, reference string) ([]byte, error) {
	digest := ""
	if strings.Contains(reference, ":") { // no tag has a colon
		digest = reference
	}
	header := http.Header{"Accept": {strings.Join([]string{
		string(types.OCIImageIndex), string(types.OCIManifestSchema1), string(types.DockerManifestList), string(types.DockerManifestSchema2),
	}, ", ")}}
	var text []byte
	err := r.try(ctx, func(ctx context.Context) (bool, error) {
		return false, r.get(ctx, "manifests", reference, header, func(response *http.Response, body io.Reader) error {
			err := checkStatus(response, http.StatusOK)
			if err == nil {
				text, err = readDocument(body, digest)
			}
			return err
		})
	})
	return text, err
}

// blob fetches a blob, from where an earlier attempt has ended.
func (r *remote) blob(ctx context.Context, s *Store, want v1.Descriptor, report func(done int64)) error {
	p, err := s.claim(ctx, want)
	if err != nil || p == nil {
		return err
	}
	defer p.close()
	resumed := p.have > 0
	for {
		if err := r.fetch(ctx, p, report); err != nil {
			return err
		}
		err := p.finish(ctx)
		var digest *DigestError
		if !resumed || !errors.As(err, &digest) {
			return err
		}
		resumed = false // what was there may have been damaged, or of another server
	}
}

func (r *remote) fetch(ctx context.Context, p *partial, report func(done int64)) error {
	if p.rest() == 0 {
		return nil
	}
	most := p.have // what is fetched again is no progress
	return r.try(ctx, func(ctx context.Context) (bool, error) {
		header := http.Header{}
		if p.have > 0 {
			header.Set("Range", fmt.Sprintf("bytes=%d-%d", p.have, p.want.Size-1))
		}
		err := r.get(ctx, "blobs", p.want.Digest.String(), header, func(response *http.Response, body io.Reader) error {
			return p.receive(response, body, report)
		})
		progress := p.have > most
		most = max(most, p.have)
		return progress, err
	})
}

// receive takes an answer, which may be the whole or what is missing.
func (p *partial) receive(response *http.Response, body io.Reader, report func(done int64)) error {
	switch response.StatusCode {
	case http.StatusPartialContent:
		if begin := fmt.Sprintf("bytes %d-", p.have); !strings.HasPrefix(response.Header.Get("Content-Range"), begin) {
			return fmt.Errorf("the registry sent another part than was asked for: %q, and not %q", response.Header.Get("Content-Range"), begin)
		}
	case http.StatusRequestedRangeNotSatisfiable:
		if p.have == 0 {
			return checkStatus(response)
		}
		if err := p.restart(); err != nil {
			return err
		}
		return fmt.Errorf("the registry has nothing from byte %d on: %w", p.have, io.ErrUnexpectedEOF)
	default:
		if err := checkStatus(response, http.StatusOK); err != nil {
			return err
		}
		if p.have > 0 { // it knows no ranges
			if err := p.restart(); err != nil {
				return err
			}
		}
	}
	// What comes beyond the size is left unread: a body may be endless.
	buffer := make([]byte, 256<<10)
	for p.rest() > 0 {
		n, err := body.Read(buffer[:min(int64(len(buffer)), p.rest())])
		if _, writeErr := p.Write(buffer[:n]); writeErr != nil {
			return writeErr
		}
		report(p.have)
		if p.rest() > 0 && err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// explain tells what an error of a registry means for the person who wants the image.
func (r *remote) explain(err error) error {
	var dns *net.DNSError
	hint := ""
	switch status := statusOf(err); {
	case status == http.StatusNotFound:
		err = fmt.Errorf("%w at its registry: %w", smolvm.ErrImageNotFound, err)
		hint = "is the name right, and the tag?"
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		hint = fmt.Sprintf("there is no such image, or it is not public: log in by `docker login %s` or `podman login %s`", r.ref.Registry, r.ref.Registry)
	case status == http.StatusTooManyRequests:
		hint = "the registry allows only so many pulls in a time: log in, or wait"
	case errors.As(err, &dns):
		hint = fmt.Sprintf("is the name of the registry, %q, right, and does this host reach it?", r.ref.Registry)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, errStalled):
		hint = "pull again: what has come is kept"
	}
	if hint == "" {
		return err
	}
	return &smolvm.Error{Err: err, Hint: hint}
}
