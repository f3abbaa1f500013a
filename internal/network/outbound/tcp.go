package outbound

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/sniff"
)

// firstTime is how long the name that a flow states may take to come, if it decides whether
// the flow is let out: from the flow's first byte on, or, if nothing is let through before,
// from its beginning on.
const firstTime = 10 * time.Second

// tcpFlow is a TCP connection of the guest to the outside. It looks at the first bytes that
// the guest sends, for the name in them. As long as that may change the verdict, what the
// guest sends is held back; what comes from outside is not, as many a server speaks first.
type tcpFlow struct {
	GuestConn
	of *Outbound
	recording

	// Of the one who reads.
	first []byte    // what the guest has sent first, until its name is known
	taken int       // how much of that has been let through
	ahead []byte    // what has been read and not let through yet
	since time.Time // when what is held back began to be
	named atomic.Bool

	mu      sync.Mutex // guards the following
	outside net.Conn   // nil while there is none
	flow    network.Flow
}

// verdict returns what the policy says now, by the names that are known so far. Final tells
// that there will be no others.
func (f *tcpFlow) verdict(final bool) network.Verdict {
	v := f.of.verdict(f.known())
	v.Provisional = v.Provisional && !final
	return v
}

// known returns what is known of the flow.
func (f *tcpFlow) known() network.Flow {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.flow
}

// recheck ends the flow at once if the policy does not allow it any more.
func (f *tcpFlow) recheck() {
	if v := f.verdict(f.named.Load()); !v.Allowed {
		f.cut()
	}
}

// cut breaks the flow off, on both sides.
func (f *tcpFlow) cut() {
	f.Abort()
	f.mu.Lock()
	defer f.mu.Unlock()
	if conn, ok := f.outside.(*net.TCPConn); ok {
		_ = conn.SetLinger(0) // makes closing send a reset, see socket(7)
		_ = conn.Close()
	}
}

// Read implements [net.Conn], for what goes out. The error matches [ErrRefused] if the flow
// states a name that is not allowed.
func (f *tcpFlow) Read(p []byte) (int, error) {
	for len(f.ahead) == 0 {
		if f.named.Load() {
			n, err := f.GuestConn.Read(p)
			f.sent.Add(int64(n))
			return n, err
		}
		if err := f.look(p, false); err != nil {
			return 0, err
		}
	}
	n := copy(p, f.ahead)
	f.ahead = f.ahead[n:]
	f.sent.Add(int64(n))
	return n, nil
}

// Write implements [net.Conn], for what comes in.
func (f *tcpFlow) Write(p []byte) (int, error) {
	n, err := f.GuestConn.Write(p)
	f.received.Add(int64(n))
	return n, err
}

// KernelConn is a [GuestConn] that is a connection of the host's kernel, which can move what comes
// by it to another one by itself.
type KernelConn interface {
	GuestConn
	// Kernel returns the connection.
	Kernel() *net.TCPConn
}

// WriteTo implements [io.WriterTo], for what goes out: as soon as nothing depends on what the
// guest sends, the kernel moves it, if it can.
func (f *tcpFlow) WriteTo(to io.Writer) (sent int64, err error) {
	kernel, ok := f.GuestConn.(KernelConn)
	if !ok {
		return io.Copy(to, justReader{f})
	}
	buffer := make([]byte, 32<<10)
	for !f.named.Load() || len(f.ahead) > 0 {
		n, err := f.Read(buffer)
		if n > 0 {
			n, err := to.Write(buffer[:n])
			if sent += int64(n); err != nil {
				return sent, err
			}
		}
		if errors.Is(err, io.EOF) {
			return sent, nil
		}
		if err != nil {
			return sent, err
		}
	}
	n, err := io.Copy(to, kernel.Kernel())
	f.sent.Add(n)
	return sent + n, err
}

// ReadFrom implements [io.ReaderFrom], for what comes in, which the kernel moves if it can.
func (f *tcpFlow) ReadFrom(from io.Reader) (received int64, err error) {
	if kernel, ok := f.GuestConn.(KernelConn); ok {
		n, err := kernel.Kernel().ReadFrom(from)
		f.received.Add(n)
		return n, err
	}
	return io.Copy(justWriter{f}, from)
}

type justReader struct{ io.Reader }

type justWriter struct{ io.Writer }

// awaitName returns when the flow has stated its name, or will not any more. The error
// matches [ErrRefused] if it may not have it.
func (f *tcpFlow) awaitName() error {
	f.since = time.Now()
	_ = f.SetReadDeadline(f.since.Add(firstTime))
	buffer := make([]byte, 4<<10)
	for !f.named.Load() {
		if err := f.look(buffer, true); err != nil {
			return err
		}
	}
	return nil
}

// look reads once, looks for a name in what the guest has sent first, and lets it through
// unless it is to be held back. Always holds back until the name is known.
func (f *tcpFlow) look(buffer []byte, always bool) error {
	n, err := f.GuestConn.Read(buffer[:min(len(buffer), sniff.Max-len(f.first))])
	f.first = append(f.first, buffer[:n]...)
	late := isTimeout(err) && !f.since.IsZero()
	if err != nil && !late && len(f.first) == f.taken {
		return err // all that came has been let through
	}
	names, named := sniff.First(f.first, err != nil)
	if named {
		f.mu.Lock()
		f.flow.Names.SNI, f.flow.Names.Host, f.flow.Names.Hidden = names.SNI, names.Host, names.Hidden
		f.mu.Unlock()
		f.named.Store(true) // a change of the policy from here on sees the names
	}
	v := f.verdict(named)
	switch {
	case !v.Allowed && !v.Provisional:
		return refusal(f.flow, v)
	case !named && (v.Provisional || always):
		if f.since.IsZero() {
			f.since = time.Now()
			_ = f.SetReadDeadline(f.since.Add(firstTime))
		}
		return nil
	}
	f.ahead = f.first[f.taken:]
	f.taken = len(f.first)
	if named {
		f.first = nil
	}
	if !f.since.IsZero() {
		f.since = time.Time{}
		_ = f.SetReadDeadline(time.Time{})
	}
	return nil
}
