package tapnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/outbound"
)

const (
	// maxWatched is how many connections of a guest are followed to their end; of those beyond
	// that only the beginning is recorded.
	maxWatched = 1 << 14
	// watchBuffer holds what the kernel tells while the watcher is busy, in bytes.
	watchBuffer = 1 << 20
	// lastWords is how long the kernel may take to tell of connections that it was made to forget.
	lastWords = time.Second
)

// watcher records the connections of a guest that the kernel carries. The kernel tells of each
// when it begins, and when it is forgotten, with the bytes that passed. Of changes of its state
// it would tell too: of each connection twice as much, which costs a third of the rate at which a
// guest can make them.
type watcher struct {
	conn     *netlink.Conn
	gateways [2]netip.Addr
	out      *outbound.Outbound
	recorder network.Recorder
	done     chan struct{} // closed when nothing is recorded any more

	mu     sync.Mutex                            // guards the following
	open   map[uint32]func(sent, received int64) // record the ends of connections
	ending bool
}

// endWatch ends what records the connections that the kernel carries.
func (n *Network) endWatch() {
	if n.watcher != nil {
		n.watcher.close()
		n.watcher = nil
	}
}

// watch begins to record the guest's connections.
func watch(config network.Config, out *outbound.Outbound, recorder network.Recorder) (*watcher, error) {
	fail := func(err error) (*watcher, error) {
		return nil, fmt.Errorf("connections that the kernel carries are not in the flow log: %w", err)
	}
	filter, err := bpf.Assemble(fromGuest(config.Guest, config.Guest6))
	if err != nil {
		return fail(err)
	}
	_ = setSysctl("netfilter/nf_conntrack_acct", "1") // or bytes are not counted
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fail(err)
	}
	_ = conn.SetReadBuffer(watchBuffer)
	err = conn.SetBPF(filter)
	for _, group := range []uint32{unix.NFNLGRP_CONNTRACK_NEW, unix.NFNLGRP_CONNTRACK_DESTROY} {
		if err == nil {
			err = conn.JoinGroup(group)
		}
	}
	if err != nil {
		_ = conn.Close()
		return fail(err)
	}
	w := &watcher{
		conn: conn, gateways: [2]netip.Addr{config.Gateway, config.Gateway6}, out: out, recorder: recorder,
		done: make(chan struct{}), open: map[uint32]func(sent, received int64){},
	}
	go w.serve()
	return w, nil
}

// fromGuest returns a program that lets messages of the kernel pass whose connection was begun by
// a guest, as the kernel tells every listener of those of all the host. A message is a header of
// 16 bytes, the family of addresses, and attributes, the first of which is the direction of who
// began (CTA_TUPLE_ORIG), in which the addresses are first (CTA_TUPLE_IP), and the source before
// all else.
func fromGuest(ipv4, ipv6 netip.Addr) []bpf.Instruction {
	const family, source = 16, 16 + 4 + 3*unix.NLA_HDRLEN
	var program []bpf.Instruction
	for _, addr := range []netip.Addr{ipv4, ipv6} {
		if !addr.IsValid() {
			continue
		}
		kind, bytes := uint32(unix.AF_INET), addr.AsSlice()
		if addr.Is6() {
			kind = unix.AF_INET6
		}
		words := len(bytes) / 4
		// One that does not match goes on behind this part.
		program = append(program, bpf.LoadAbsolute{Off: family, Size: 1}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: kind, SkipTrue: uint8(2*words + 1)})
		for i := range words {
			program = append(program,
				bpf.LoadAbsolute{Off: uint32(source + 4*i), Size: 4},
				bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(bytes[4*i:]), SkipTrue: uint8(2*(words-i-1) + 1)})
		}
		program = append(program, bpf.RetConstant{Val: 1 << 16})
	}
	return append(program, bpf.RetConstant{Val: 0})
}

// serve records until the watcher is closed, or ends and there is nothing left to come.
func (w *watcher) serve() {
	defer close(w.done)
	for {
		messages, err := w.conn.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			w.recorder.Record(smolvm.FlowRecord{Kind: smolvm.FlowLost, Lost: 1, Detail: "the guest made connections faster than the kernel could tell of them"})
			continue
		case err != nil:
			return
		}
		for _, m := range messages {
			var e conntrack.Event
			if e.Unmarshal(m) == nil && e.Flow != nil {
				w.take(uint8(e.Type), e.Flow)
			}
		}
		if w.isDone() {
			return
		}
	}
}

func (w *watcher) isDone() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ending && len(w.open) == 0
}

// take records what the kernel tells of a connection.
func (w *watcher) take(event uint8, f *conntrack.Flow) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch event {
	case uint8(conntrack.EventNew):
		w.begin(f)
	case uint8(conntrack.EventDestroy):
		if end := w.open[f.ID]; end != nil {
			delete(w.open, f.ID)
			end(int64(f.CountersOrig.Bytes), int64(f.CountersReply.Bytes))
		}
	}
}

func (w *watcher) begin(f *conntrack.Flow) {
	protocol := map[uint8]smolvm.Protocol{unix.IPPROTO_TCP: smolvm.TCP, unix.IPPROTO_UDP: smolvm.UDP}[f.TupleOrig.Proto.Protocol]
	to := netip.AddrPortFrom(f.TupleOrig.IP.DestinationAddress, f.TupleOrig.Proto.DestinationPort)
	// What goes to the gateway are questions for names, which are recorded as such.
	if protocol == "" || to.Addr() == w.gateways[0] || to.Addr() == w.gateways[1] {
		return
	}
	end := w.out.Forwarded(to, protocol)
	if len(w.open) < maxWatched {
		w.open[f.ID] = end
	}
}

// close ends the watcher, after the kernel was made to forget the guest's connections: when it has
// told of that, or too late.
func (w *watcher) close() {
	w.mu.Lock()
	w.ending = true
	wait := len(w.open) > 0
	w.mu.Unlock()
	if wait {
		_ = w.conn.SetReadDeadline(time.Now().Add(lastWords))
		<-w.done
	}
	_ = w.conn.Close()
	<-w.done
	for _, end := range w.open {
		end(0, 0)
	}
}
