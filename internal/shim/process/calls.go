package process

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/plain"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/network"
)

// maxCallWords is how much is kept of a command's words that come as data, in bytes: more than is
// recorded of them.
const maxCallWords = 8 << 10

// call is a connection of a client to the guest's agent, which this process passes on. What it is
// for is read on the client's side, so the guest has no say in that; how it went is what the guest
// tells the client. An SSH client's connection is encrypted from end to end.
type call struct {
	net.Conn // the client's
	to       network.Recorder
	fromHost plain.Observer
	fromVM   plain.Observer
	began    time.Time

	in, out atomic.Int64 // bytes to the guest and from it

	mu     sync.Mutex // guards the following
	record smolvm.FlowRecord
	opened bool         // its beginning was recorded
	asked  *wire.Words  // the words that are to come as data
	words  bytes.Buffer // of them
	what   wire.ExecRequest
	ended  sync.Once
}

// calls are the calls that are under way.
type calls struct {
	mu   sync.Mutex // guards the following
	open map[*call]struct{}
}

// record returns the connection of a client that is recorded as it is used, until end is called.
func (all *calls) record(conn net.Conn, to network.Recorder) (c *call, end func()) {
	c = &call{Conn: conn, to: to, began: time.Now()}
	c.fromHost = plain.Observer{Opened: c.open, Data: c.data, Foreign: c.foreign}
	c.fromVM = plain.Observer{Requested: c.told}
	all.mu.Lock()
	defer all.mu.Unlock()
	if all.open == nil {
		all.open = map[*call]struct{}{}
	}
	all.open[c] = struct{}{}
	return c, func() {
		c.end()
		all.mu.Lock()
		defer all.mu.Unlock()
		delete(all.open, c)
	}
}

// end records the end of all calls, whose clients may not have noticed yet that the VM is gone.
func (all *calls) end() {
	all.mu.Lock()
	defer all.mu.Unlock()
	for c := range all.open {
		c.end()
	}
}

// Read implements [net.Conn].
func (c *call) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.in.Add(int64(n))
	_, _ = c.fromHost.Write(p[:n])
	return n, err
}

// Write implements [net.Conn].
func (c *call) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.out.Add(int64(n))
	_, _ = c.fromVM.Write(p[:n])
	return n, err
}

// CloseWrite closes the connection for writing.
func (c *call) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}

// open notes what a call is for.
func (c *call) open(kind string, payload []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch kind {
	case wire.ExecChannel:
		if json.Unmarshal(payload, &c.what) == nil && c.what.Words != nil {
			c.asked = c.what.Words
			return // the words follow
		}
		c.exec()
	case wire.TreeChannel:
		var request wire.TreeRequest
		_ = json.Unmarshal(payload, &request)
		r := smolvm.FlowRecord{Kind: smolvm.FlowCopyOut, Path: string(request.Path)}
		if request.Extract {
			r.Kind = smolvm.FlowCopyIn
		}
		c.begin(r)
	case "direct-tcpip":
		var to struct {
			Host       string
			Port       uint32
			OriginHost string
			OriginPort uint32
		}
		_ = ssh.Unmarshal(payload, &to)
		c.begin(smolvm.FlowRecord{Kind: smolvm.FlowDial, Address: net.JoinHostPort(to.Host, strconv.FormatUint(uint64(to.Port), 10))})
	case "direct-streamlocal@openssh.com":
		var to struct {
			Path     string
			Reserved string
			Unused   uint32
		}
		_ = ssh.Unmarshal(payload, &to)
		c.begin(smolvm.FlowRecord{Kind: smolvm.FlowDial, Path: to.Path})
	}
}

// foreign notes a connection of an SSH client.
func (c *call) foreign() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.opened {
		c.begin(smolvm.FlowRecord{Kind: smolvm.FlowSSH})
	}
}

// data takes the words of a command that are too long, or no text, for its request.
func (c *call) data(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asked == nil || c.opened {
		return
	}
	most := max(0, min(c.asked.Size, maxCallWords))
	c.words.Write(p[:min(len(p), max(0, most-c.words.Len()))])
	if c.words.Len() < most {
		return
	}
	c.begin(c.withWords())
}

// withWords returns the record of a command, of whose words the beginning has come.
func (c *call) withWords() smolvm.FlowRecord {
	const placeWords = 3 // user, directory, terminal
	all := bytes.Split(c.words.Bytes(), []byte{0})
	r := smolvm.FlowRecord{Kind: smolvm.FlowExec}
	for i, word := range all {
		switch {
		case i == 0:
			r.User = string(word)
		case i == 1:
			r.Dir = string(word)
		case i >= placeWords && i < placeWords+c.asked.Args:
			r.Args = append(r.Args, string(word))
		}
	}
	return r
}

// exec records a command whose words are in its request.
func (c *call) exec() {
	c.begin(smolvm.FlowRecord{Kind: smolvm.FlowExec, Args: c.what.Args, User: c.what.User, Dir: c.what.Dir})
}

// begin records the beginning of a call.
func (c *call) begin(r smolvm.FlowRecord) {
	r.Event, r.Flow = smolvm.FlowOpen, c.to.NextFlow()
	c.record, c.opened = r, true
	c.words = bytes.Buffer{}
	c.to.Record(r)
}

// told notes how the guest says that a command has ended.
func (c *call) told(name string, payload []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch name {
	case "exit-status":
		if len(payload) == 4 {
			code := int(min(binary.BigEndian.Uint32(payload), 255))
			c.record.ExitCode = &code
		}
	case "exit-signal":
		var message struct {
			Name       string
			CoreDumped bool
			Message    string
			Language   string
		}
		if ssh.Unmarshal(payload, &message) == nil {
			if number := wire.SignalNumber(message.Name); number > 0 {
				code := 128 + number
				c.record.Signal, c.record.ExitCode = message.Name, &code
			}
		}
	}
}

// end records the end of a call.
func (c *call) end() {
	c.ended.Do(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.asked != nil && !c.opened {
			c.begin(c.withWords()) // as far as they have come
		}
		if !c.opened {
			return
		}
		r := c.record
		r.Event, r.Duration = smolvm.FlowClose, time.Since(c.began)
		r.ReceivedBytes, r.SentBytes = c.in.Load(), c.out.Load()
		c.to.Record(r)
	})
}
