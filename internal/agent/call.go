package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/plain"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/stream"
)

// call is an open channel to the guest's agent, for one command, copy or connection.
type call struct {
	ssh.Channel
	client *Client
	began  time.Time
	// connected is closed once Channel is set.
	connected chan struct{}
	// kills reports whether what the call has started is to end when the call is given up.
	kills bool

	// over is closed when the guest has closed the channel as well, or the connection
	// has ended. Then status and err are how the guest says that it went.
	over   chan struct{}
	status smolvm.ExitStatus
	err    error
	// pid gets the process id of a command, once, if it was asked for.
	pid chan int

	ended sync.Once
}

// mustJSON encodes a request; all of them can be.
func mustJSON(request any) []byte {
	text, err := json.Marshal(request)
	if err != nil {
		panic(err)
	}
	return text
}

// open opens a channel. An SSH library call can't be cancelled, so when ctx is done
// first, the channel is closed when it opens.
func (c *Client) open(ctx context.Context, kind string, payload []byte) (*call, error) {
	k := &call{client: c, began: time.Now(), connected: make(chan struct{}), over: make(chan struct{}), pid: make(chan int, 1)}
	if err := c.begin(k); err != nil {
		return nil, describeOpen(err)
	}
	opened := make(chan error, 1)
	go func() {
		channel, requests, err := c.openChannel(ctx, kind, payload)
		if err == nil {
			k.Channel = channel
			close(k.connected)
			go k.follow(requests)
		}
		opened <- err
	}()
	select {
	case err := <-opened:
		if err != nil {
			k.end()
			return nil, k.explain(describeOpen(err))
		}
		return k, nil
	case <-ctx.Done():
		go k.forsake(opened)
		return nil, context.Cause(ctx)
	}
}

// forsake gives up a channel that is not open yet.
func (k *call) forsake(opened <-chan error) {
	var err error
	select {
	case err = <-opened:
	case <-time.After(answerTime):
		k.giveUp()
		err = <-opened
	}
	if err == nil {
		k.abandon()
	} else {
		k.end()
	}
}

// abandon gives the call up without waiting for the guest. If the guest does not confirm
// it soon, the connection takes no further calls.
func (k *call) abandon() {
	go func() {
		if k.kills {
			_, _ = k.SendRequest("signal", false, ssh.Marshal(struct{ Name string }{"KILL"}))
		}
		_ = k.Close()
	}()
	go func() {
		select {
		case <-k.over:
		case <-time.After(answerTime):
			k.giveUp()
		}
	}()
}

// giveUp ends a call that the guest does not confirm to be over.
func (k *call) giveUp() {
	if !k.abort() {
		k.client.retire()
	}
	k.end()
}

// abort ends the call's connection, if it has one of its own.
func (k *call) abort() bool {
	select {
	case <-k.connected:
	default:
		return false
	}
	channel, ok := k.Channel.(*plain.Channel)
	if ok {
		channel.Abort()
	}
	return ok
}

// errLost is the error of a command whose connection has ended before it did.
var errLost = errors.New("connection to the guest was lost before the command ended")

// explain adds to the error of a connection that was lost why that has ended, if it is known.
func (k *call) explain(err error) error {
	if k.client.config.Lost == nil || !errors.Is(err, errLost) && !stream.IsBroken(err) {
		return err
	}
	if why := k.client.config.Lost(k.began); why != nil {
		return fmt.Errorf("%w: %w", err, why)
	}
	return err
}

// end counts the call out.
func (k *call) end() { k.ended.Do(func() { k.client.end(k) }) }

// follow reads requests until the channel ends, among which is how it went.
func (k *call) follow(requests <-chan *ssh.Request) {
	k.err = errLost
	for request := range requests {
		if status, err := parseStatus(request); err != nil || status != nil {
			if k.err = err; err == nil {
				k.status = *status
			}
		}
		k.notePID(request)
		if request.WantReply {
			_ = request.Reply(false, nil)
		}
	}
	close(k.over)
	k.end()
}

// notePID passes on the first process id that the guest sends.
func (k *call) notePID(request *ssh.Request) {
	var message struct{ PID uint32 }
	if request.Type != wire.PIDRequest || ssh.Unmarshal(request.Payload, &message) != nil {
		return
	}
	select {
	case k.pid <- int(message.PID):
	default:
	}
}

// parseStatus reads how a command ended; nil if the request says nothing about that.
func parseStatus(request *ssh.Request) (*smolvm.ExitStatus, error) {
	switch request.Type {
	case "exit-status":
		var message struct{ Code uint32 }
		if err := ssh.Unmarshal(request.Payload, &message); err != nil {
			return nil, err
		}
		return &smolvm.ExitStatus{Code: int(min(message.Code, 255))}, nil
	case "exit-signal":
		var message struct {
			Name       string
			CoreDumped bool
			Message    string
			Language   string
		}
		if err := ssh.Unmarshal(request.Payload, &message); err != nil {
			return nil, err
		}
		number := wire.SignalNumber(message.Name)
		if number == 0 {
			return nil, fmt.Errorf("guest: command ended by an unknown signal %q", wire.Text(message.Name, 20))
		}
		return &smolvm.ExitStatus{Code: 128 + number, Signal: message.Name}, nil
	}
	return nil, nil
}

// describeOpen gives the agent's own words, without SSH's around them.
func describeOpen(err error) error {
	if refused, ok := errors.AsType[*ssh.OpenChannelError](err); ok {
		return errors.New("guest: " + wire.Text(refused.Message, 1<<10))
	}
	return fmt.Errorf("connection to the guest: %w", err)
}
