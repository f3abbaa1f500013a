package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// qmp is a connection to QEMU's control protocol: one line of JSON a message. See
// QEMU's docs/interop/qmp-spec.
type qmp struct {
	conn   *net.UnixConn
	events func(event) // called in order, from one goroutine; must not block

	mu      sync.Mutex // guards the following, and writes
	nextID  int
	pending map[int]chan reply
	err     error // why the connection ended

	done chan struct{} // closed when it has ended
}

// event is something that QEMU tells unasked.
type event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

type reply struct {
	ID     *int            `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`
}

// qmpError is QEMU's refusal of a command.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

// sendTime bounds how long a command may take to be sent.
const sendTime = time.Second

var errQMPClosed = errors.New("control connection to QEMU is closed")

// newQMP serves conn until it is closed. The first command must be
// qmp_capabilities; QEMU's greeting needs no waiting for.
func newQMP(conn *net.UnixConn, events func(event)) *qmp {
	q := &qmp{conn: conn, events: events, pending: map[int]chan reply{}, done: make(chan struct{})}
	go q.read()
	return q
}

// request is one command.
type request struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        int    `json:"id"`

	file *os.File // travels with the command, for "getfd" and "add-fd"
}

// execute runs a command without arguments and decodes what it returns into result, if
// not nil.
func (q *qmp) execute(ctx context.Context, command string, result any) error {
	return q.do(ctx, request{Execute: command}, result)
}

// settle is do for a command that changes something. Once it has been sent it will be
// executed, so it is not given up any more: whoever did would take the guest for what it
// was before. Only QEMU's end ends the wait.
func (q *qmp) settle(ctx context.Context, r request) error { return q.settleWith(ctx, r, nil) }

// settleWith is settle, and decodes what is returned into result, if not nil.
func (q *qmp) settleWith(ctx context.Context, r request, result any) error {
	if ctx.Err() != nil {
		return fmt.Errorf("QMP %s: %w", r.Execute, context.Cause(ctx))
	}
	return q.do(context.WithoutCancel(ctx), r, result)
}

func (q *qmp) do(ctx context.Context, r request, result any) error {
	answer := make(chan reply, 1)
	if err := q.send(r, answer); err != nil {
		return fmt.Errorf("QMP %s: %w", r.Execute, err)
	}
	select {
	case got := <-answer:
		if got.Error != nil {
			return fmt.Errorf("QMP %s: %w", r.Execute, got.Error)
		}
		if result != nil {
			if err := json.Unmarshal(got.Return, result); err != nil {
				return fmt.Errorf("QMP %s: decode result: %w", r.Execute, err)
			}
		}
		return nil
	case <-q.done:
		return fmt.Errorf("QMP %s: %w", r.Execute, q.err)
	case <-ctx.Done():
		return fmt.Errorf("QMP %s: %w", r.Execute, context.Cause(ctx))
	}
}

func (q *qmp) send(r request, answer chan reply) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return q.err
	}
	q.nextID++
	r.ID = q.nextID
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	var rights []byte
	if r.file != nil {
		rights = unix.UnixRights(int(r.file.Fd()))
	}
	// The socket holds hundreds of commands, so a QEMU that has left it full hangs; the
	// others must not wait for it here.
	_ = q.conn.SetWriteDeadline(time.Now().Add(sendTime))
	if _, _, err := q.conn.WriteMsgUnix(append(line, '\n'), rights, nil); err != nil {
		return fmt.Errorf("%w: %w", errQMPClosed, err)
	}
	q.pending[q.nextID] = answer
	return nil
}

// read hands out what QEMU sends until the connection ends.
func (q *qmp) read() {
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		q.handle(lines.Bytes())
	}
	err := errQMPClosed
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		err = fmt.Errorf("control connection to QEMU: %w", lines.Err())
	}
	q.mu.Lock()
	q.err = err
	q.mu.Unlock()
	close(q.done)
}

func (q *qmp) handle(line []byte) {
	var message struct {
		event
		reply
	}
	if json.Unmarshal(line, &message) != nil {
		return // not for us: QEMU's own errors come as JSON too
	}
	switch {
	case message.Name != "":
		q.events(message.event)
	case message.ID != nil:
		q.mu.Lock()
		answer := q.pending[*message.ID]
		delete(q.pending, *message.ID)
		q.mu.Unlock()
		if answer != nil {
			answer <- message.reply
		}
	}
}
