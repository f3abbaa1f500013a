// Package firecrackerfake is a Firecracker for tests that runs no guest: its API, which can
// misbehave at any call, and a program that stands for Firecracker's; see [Main].
package firecrackerfake

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

// Fault is how a call goes wrong.
type Fault string

// The faults.
const (
	FaultLate   Fault = "late"   // it is answered, after a while
	FaultRefuse Fault = "refuse" // with status 400 and a fault_message
	FaultCut    Fault = "cut"    // the answer ends in the middle of its JSON
	FaultDie    Fault = "die"    // Firecracker ends instead
	FaultHang   Fault = "hang"   // it is never answered
	FaultLong   Fault = "long"   // the answer is longer than any real one
)

// Refusal is the fault_message of [FaultRefuse].
const Refusal = "the fake says no"

// lateness is how long an answer takes that comes late. It is more than a real one takes.
const lateness = 50 * time.Millisecond

// Options of a [Server].
type Options struct {
	// Version that is told. Empty: 1.12.1.
	Version string
	// Call is the one that goes wrong, such as "PUT /vsock", and Fault how. Empty: none does.
	Call  string
	Fault Fault
	// Start is called when a guest is to be started, or restored from a state. Nil: nothing is.
	Start func(from *Saved) error
	// Flush writes the metrics. Nil: nothing does.
	Flush func() error
	// Die ends Firecracker. Nil: the connection is closed.
	Die func()
	// Record is a file to which each request is appended, a line each. Empty: none is.
	Record string
}

// Saved is what the state of a saved guest holds.
type Saved struct {
	Version   string `json:"version"`
	MemoryMiB int    `json:"memory_mib"`
}

// Server is the API of a fake Firecracker.
type Server struct {
	opts   Options
	http   http.Server
	closed chan struct{}

	mu        sync.Mutex // guards the following
	requests  []Request
	memoryMiB int
	started   bool
	paused    bool
}

// Request is one that was received.
type Request struct {
	Call string // such as "PUT /vsock"
	Body string
}

// New returns a server. It is to be closed.
func New(opts Options) *Server {
	if opts.Version == "" {
		opts.Version = "1.12.1"
	}
	const defaultMiB = 128
	s := &Server{opts: opts, closed: make(chan struct{}), memoryMiB: defaultMiB}
	s.http = http.Server{Handler: s, ReadHeaderTimeout: time.Minute}
	return s
}

// Serve answers requests until the server is closed.
func (s *Server) Serve(listener net.Listener) { _ = s.http.Serve(listener) }

// Close ends all connections, and requests that hang.
func (s *Server) Close() {
	close(s.closed)
	_ = s.http.Close()
}

// Requests returns what has been received.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request{}, s.requests...)
}

// record appends a line to the file of requests.
func (s *Server) record(line string) {
	if s.opts.Record == "" {
		return
	}
	file, err := os.OpenFile(s.opts.Record, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return // the test finds nothing
	}
	_, _ = fmt.Fprintln(file, line)
	_ = file.Close()
}

func (s *Server) isPaused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.paused
}

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body bytes.Buffer
	_, _ = body.ReadFrom(r.Body)
	call := r.Method + " " + r.URL.Path
	s.mu.Lock()
	s.requests = append(s.requests, Request{call, body.String()})
	s.record(call + " " + body.String())
	s.mu.Unlock()
	if call == s.opts.Call && !s.goesOn(r.Context(), w) {
		return
	}
	answer, err := s.answer(call, body.Bytes())
	switch {
	case err != nil:
		refuse(w, err.Error())
	case answer == nil:
		w.WriteHeader(http.StatusNoContent)
	default:
		text, _ := json.Marshal(answer) // of plain data
		if call == s.opts.Call && s.opts.Fault == FaultCut {
			text = text[:len(text)/2]
		}
		_, _ = w.Write(text)
	}
}

// goesOn does what is to go wrong with a call, and reports whether it is answered after that.
func (s *Server) goesOn(ctx context.Context, w http.ResponseWriter) bool {
	switch s.opts.Fault {
	case FaultLate:
		<-time.After(lateness)
		return true
	case FaultCut:
		return true // if it has an answer with JSON
	case FaultRefuse:
		refuse(w, Refusal)
	case FaultLong:
		_, _ = fmt.Fprintf(w, `{"app_name": %q}`, strings.Repeat("long ", 1<<18))
	case FaultDie:
		if s.opts.Die != nil {
			s.opts.Die()
		}
		panic(http.ErrAbortHandler)
	case FaultHang:
		select {
		case <-s.closed:
		case <-ctx.Done():
		}
		panic(http.ErrAbortHandler)
	}
	return false
}

func refuse(w http.ResponseWriter, message string) {
	w.WriteHeader(http.StatusBadRequest)
	_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": message})
}

// answer does what a request asks for.
func (s *Server) answer(call string, body []byte) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	method, path, _ := strings.Cut(call, " ")
	preBoot := method == http.MethodPut && path != "/actions" && path != "/snapshot/create"
	switch {
	case call == "GET /version":
		return map[string]string{"firecracker_version": s.opts.Version}, nil
	case call == "GET /":
		return map[string]string{"app_name": "Firecracker", "id": "fake", "state": s.state(), "vmm_version": s.opts.Version}, nil
	case call == "GET /machine-config":
		return map[string]any{"vcpu_count": 1, "mem_size_mib": s.memoryMiB, "smt": false, "track_dirty_pages": false, "huge_pages": "None"}, nil
	case preBoot && s.started:
		return nil, fmt.Errorf("The requested operation is not supported after starting the microVM: %s", call) //nolint:staticcheck // its own words
	case call == "PUT /machine-config":
		var m struct {
			MemoryMiB int `json:"mem_size_mib"`
		}
		err := json.Unmarshal(body, &m)
		s.memoryMiB = m.MemoryMiB
		return nil, err
	case call == "PUT /actions":
		return nil, s.act(body)
	case call == "PATCH /vm":
		s.paused = bytes.Contains(body, []byte("Paused"))
		return nil, nil
	case call == "PUT /snapshot/create":
		return nil, s.save(body)
	case call == "PUT /snapshot/load":
		return nil, s.load(body)
	}
	return nil, nil // settings, of which nothing comes
}

func (s *Server) state() string {
	switch {
	case !s.started:
		return "Not started"
	case s.paused:
		return "Paused"
	}
	return "Running"
}

func (s *Server) act(body []byte) error {
	switch {
	case bytes.Contains(body, []byte("InstanceStart")):
		s.started = true
		return s.start(nil)
	case bytes.Contains(body, []byte("FlushMetrics")) && s.opts.Flush != nil:
		return s.opts.Flush()
	}
	return nil
}

func (s *Server) start(from *Saved) error {
	if s.opts.Start == nil {
		return nil
	}
	return s.opts.Start(from)
}
