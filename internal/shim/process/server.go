package process

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/stream"
)

// dialTimeout is how long a guest may take to accept a connection; its kernel does so
// at once, if it does at all.
const dialTimeout = 30 * time.Second

// usageTime bounds how long a VMM may take to tell what it has counted.
const usageTime = 10 * time.Second

// serveControl answers requests until the listener is closed.
func (s *process) serveControl(listener net.Listener) {
	stream.Accept(context.Background(), listener, func(conn net.Conn) { go s.answerRequest(conn) })
}

func (s *process) answerRequest(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	reader := bufio.NewReader(conn)
	line, err := reader.ReadBytes('\n')
	var asked shim.Request
	if err != nil || json.Unmarshal(line, &asked) != nil || !s.beginRequest() {
		return
	}
	if asked.Op == shim.OpDial {
		s.requests.Done() // it may last as long as the VM
		s.connectGuest(conn, reader, asked.Port)
		return
	}
	defer s.requests.Done()
	ctx := context.Background()
	if asked.Op == shim.OpSave {
		// A save is slow: it is cancelled if the client that asked for it is gone.
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		go func() {
			_, _ = reader.ReadByte() // until the client is gone, or we close the connection
			cancel()
		}()
	}
	var answer shim.Response
	if err := s.handle(ctx, asked, &answer); err != nil {
		answer = shim.Response{Failure: shim.NewFailure(err)}
	}
	_ = json.NewEncoder(conn).Encode(answer)
}

// beginRequest counts a request, unless the VM has ended and nothing can be asked of it.
func (s *process) beginRequest() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.requests.Add(1)
	}
	return !s.ended
}

// endRequests waits until the requests that were begun have been answered. All of them
// end with the VM.
func (s *process) endRequests() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.requests.Wait()
}

func (s *process) handle(ctx context.Context, asked shim.Request, answer *shim.Response) error {
	switch asked.Op {
	case shim.OpStatus:
		answer.Status = s.status()
		return nil
	case shim.OpStop:
		s.session.Stop(shim.Stop{Grace: asked.Grace, Patient: asked.Patient, Signal: asked.Signal}, "it was stopped by request")
		return nil
	case shim.OpAddForward:
		var err error
		answer.Forward, err = s.session.Forwards().Add(ctx, asked.Forward)
		return err
	case shim.OpRemoveForward:
		return s.session.Forwards().Remove(asked.Forward)
	case shim.OpSetEgress:
		if asked.Egress == nil {
			return errors.New("set the egress policy: there is none in the request")
		}
		return s.setEgress(*asked.Egress)
	case shim.OpPause:
		return s.session.Pause(ctx)
	case shim.OpResume:
		return s.session.Resume(ctx)
	case shim.OpUsage:
		ctx, cancel := context.WithTimeout(ctx, usageTime)
		defer cancel()
		usage, err := s.session.Usage(ctx)
		answer.Usage = &usage
		return err
	case shim.OpSave:
		var err error
		answer.Saved, err = s.session.Save(ctx, asked.Save)
		return err
	}
	return fmt.Errorf("shim has no operation %q; it may be older than this program", asked.Op)
}

func (s *process) status() *shim.Status {
	status := s.session.Status()
	status.Protocol, status.PID = shim.Protocol, os.Getpid()
	return &status
}

// setEgress puts an egress policy in force.
func (s *process) setEgress(egress network.Egress) error {
	attached, err := s.session.Network()
	if err != nil {
		return fmt.Errorf("set the egress policy: %w", err)
	}
	setter, ok := attached.(network.EgressSetter)
	if !ok {
		return fmt.Errorf("set the egress policy: %w: the VM's network can't have one", smolvm.ErrUnsupported)
	}
	err = setter.SetEgress(egress)
	if err == nil {
		changed := smolvm.FlowRecord{Kind: smolvm.FlowPolicy}
		addPolicy(&changed, egress)
		s.flows.Record(changed)
	}
	return err
}

// dialGuest connects to a TCP port of the guest's address.
func (s *process) dialGuest(ctx context.Context, port int) (net.Conn, error) {
	attached, err := s.session.Network()
	if err != nil {
		return nil, fmt.Errorf("connect to the guest: %w", err)
	}
	return attached.DialGuest(ctx, port)
}

// connectGuest makes conn a connection to a port of the guest.
func (s *process) connectGuest(conn net.Conn, reader *bufio.Reader, port int) {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	guest, err := s.dialGuest(ctx, port)
	cancel()
	var answer shim.Response
	if err != nil {
		answer.Failure = shim.NewFailure(err)
	}
	if json.NewEncoder(conn).Encode(answer) != nil || err != nil {
		if guest != nil {
			_ = guest.Close()
		}
		return
	}
	s.recordForward("", port)
	stream.Splice(context.Background(), stream.Peeked{Conn: conn, Reader: reader}, guest)
}

// serveAgents connects each connection to the guest's agent.
func (s *process) serveAgents(listener net.Listener) {
	stream.Accept(context.Background(), listener, func(conn net.Conn) { go s.connectAgent(conn) })
}

func (s *process) connectAgent(conn net.Conn) {
	s.active()
	defer s.active()
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	guest, err := s.session.DialAgent(ctx)
	cancel()
	if err != nil {
		// Lines before the server's version are for people; see RFC 4253, section 4.2.
		_, _ = io.WriteString(conn, err.Error()+".\r\n")
		return
	}
	call, end := s.calls.record(conn, &s.flows)
	defer end()
	stream.Splice(context.Background(), call, guest)
}
