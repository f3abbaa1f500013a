package shim

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/stream"
)

// Operations of the control socket. A connection carries one request and one
// response, a line of JSON each; after a successful dial it is the connection.
const (
	opStatus        = "status"
	opStop          = "stop"
	opAddForward    = "add-forward"
	opRemoveForward = "remove-forward"
	opPause         = "pause"
	opResume        = "resume"
	opSave          = "save"
	opDial          = "dial"
)

// dialTimeout is how long a guest may take to accept a connection; its kernel does so
// at once, if it does at all.
const dialTimeout = 30 * time.Second

type request struct {
	Op      string        `json:"op"`
	Grace   time.Duration `json:"grace_ns,omitempty"`
	Patient bool          `json:"patient,omitempty"`
	Forward Forward       `json:"forward,omitzero"`
	Port    int           `json:"port,omitempty"`
	Save    *Save         `json:"save,omitempty"`
}

type response struct {
	Failure *failure `json:"failure,omitempty"`
	Forward Forward  `json:"forward,omitzero"`
	Status  *Status  `json:"status,omitempty"`
	Saved   Saved    `json:"saved,omitzero"`
}

// Status is what a shim says of its VM.
type Status struct {
	ID     string `json:"id"`
	Run    string `json:"run"`
	PID    int    `json:"pid"` // of the shim
	VMMPID int    `json:"vmm_pid"`
	// Uptime is the time since the shim was started.
	Uptime   time.Duration `json:"uptime_ns"`
	Forwards []Forward     `json:"forwards"`
	// Halt is why the VMM has paused the guest by itself; empty if it has not.
	Halt string `json:"halt,omitempty"`
	// Answer is the agent's, if there is one.
	Answer *wire.Answer `json:"answer,omitempty"`
}

// serveControl answers requests until the listener is closed.
func (s *shim) serveControl(listener net.Listener) {
	stream.Accept(context.Background(), listener, func(conn net.Conn) { go s.answerRequest(conn) })
}

func (s *shim) answerRequest(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	reader := bufio.NewReader(conn)
	line, err := reader.ReadBytes('\n')
	var asked request
	if err != nil || json.Unmarshal(line, &asked) != nil || !s.beginRequest() {
		return
	}
	if asked.Op == opDial {
		s.requests.Done() // it may last as long as the VM
		s.connectGuest(conn, reader, asked.Port)
		return
	}
	defer s.requests.Done()
	ctx := context.Background()
	if asked.Op == opSave {
		// It takes long, and is of no use to nobody.
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		go func() {
			_, _ = reader.ReadByte() // until the client is gone, or we close the connection
			cancel()
		}()
	}
	var answer response
	if err := s.handle(ctx, asked, &answer); err != nil {
		answer = response{Failure: newFailure(err)}
	}
	_ = json.NewEncoder(conn).Encode(answer)
}

// beginRequest counts a request, unless the VM has ended and nothing can be asked of it.
func (s *shim) beginRequest() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.requests.Add(1)
	}
	return !s.ended
}

// endRequests waits until the requests that were begun have been answered. All of them
// end with the VM.
func (s *shim) endRequests() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.requests.Wait()
}

func (s *shim) handle(ctx context.Context, asked request, answer *response) error {
	switch asked.Op {
	case opStatus:
		answer.Status = s.status()
		return nil
	case opStop:
		s.stop(Stop{Grace: asked.Grace, Patient: asked.Patient}, "it was stopped by request")
		return nil
	case opAddForward:
		var err error
		answer.Forward, err = s.addForward(ctx, asked.Forward)
		return err
	case opRemoveForward:
		return s.removeForward(asked.Forward)
	case opPause:
		return s.pause(ctx)
	case opResume:
		return s.resume(ctx)
	case opSave:
		var err error
		answer.Saved, err = s.save(ctx, asked.Save)
		return err
	}
	return fmt.Errorf("shim has no operation %q; it may be older than this program", asked.Op)
}

func (s *shim) status() *Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &Status{
		ID:     s.spec.ID,
		Run:    s.spec.Run,
		PID:    os.Getpid(),
		VMMPID: s.instance.PID(),
		Uptime: time.Since(s.began),
		Halt:   s.halts.why(),
		Forwards: slices.SortedFunc(maps.Keys(s.forwards), func(a, b Forward) int {
			return cmp.Or(a.Host.Compare(b.Host), cmp.Compare(a.Protocol, b.Protocol))
		}),
		Answer: s.answer,
	}
}

// connectGuest makes conn a connection to a port of the guest.
func (s *shim) connectGuest(conn net.Conn, reader *bufio.Reader, port int) {
	var guest net.Conn
	err := fmt.Errorf("connect to the guest: %w: the VM has no network", smolvm.ErrUnsupported)
	if s.network != nil {
		ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
		guest, err = s.network.DialGuest(ctx, port)
		cancel()
	}
	var answer response
	if err != nil {
		answer.Failure = newFailure(err)
	}
	if json.NewEncoder(conn).Encode(answer) != nil || err != nil {
		if guest != nil {
			_ = guest.Close()
		}
		return
	}
	stream.Splice(context.Background(), stream.Peeked{Conn: conn, Reader: reader}, guest)
}

// serveAgents connects each connection to the agent's SSH server.
func (s *shim) serveAgents(listener net.Listener) {
	stream.Accept(context.Background(), listener, func(conn net.Conn) { go s.connectAgent(conn) })
}

func (s *shim) connectAgent(conn net.Conn) {
	s.active()
	defer s.active()
	defer func() { _ = conn.Close() }()
	if s.link == nil {
		// Lines before the server's version are for people; see RFC 4253, section 4.2.
		_, _ = io.WriteString(conn, "This guest has no agent of smolvm.\r\n")
		return
	}
	if err := s.halts.err(); err != nil {
		_, _ = io.WriteString(conn, err.Error()+".\r\n")
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	guest, err := s.link.Open(ctx)
	cancel()
	if err != nil {
		_, _ = io.WriteString(conn, "The guest's agent does not answer any more.\r\n")
		return
	}
	stream.Splice(context.Background(), conn, guest)
}
