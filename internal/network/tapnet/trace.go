package tapnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// step is what nftables says of one place that a packet has passed, or not.
type step struct {
	family       nftables.TableFamily
	table, chain string
	rule         uint64 // its handle; 0: the chain's policy
	dropped      bool
}

// tracer hears what nftables does with the packets that are traced.
type tracer struct{ socket *nl.NetlinkSocket }

func newTracer() (*tracer, error) {
	socket, err := nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTRACE)
	if err != nil {
		return nil, fmt.Errorf("listen to what nftables does with packets: %w", err)
	}
	return &tracer{socket}, nil
}

func (t *tracer) close() { t.socket.Close() }

// steps returns what is said of packets until one is dropped, and at the latest when nothing is said
// for some time, or ctx is done.
func (t *tracer) steps(ctx context.Context, silence time.Duration) ([]step, error) {
	var all []step
	for end := time.Now().Add(silence); time.Now().Before(end) && ctx.Err() == nil; {
		timeout := unix.NsecToTimeval(time.Until(end).Nanoseconds())
		if err := t.socket.SetReceiveTimeout(&timeout); err != nil {
			return all, err
		}
		messages, _, err := t.socket.Receive()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return all, fmt.Errorf("hear what nftables does with packets: %w", err)
		}
		for _, message := range messages {
			if s, ok := parseStep(message.Header.Type, message.Data); ok {
				all = append(all, s)
				if s.dropped {
					return all, nil
				}
				end = time.Now().Add(silence)
			}
		}
	}
	return all, context.Cause(ctx)
}

// Kinds of what is said, and of verdicts; see linux/netfilter/nf_tables.h.
const (
	tracedPolicy, tracedRule = 1, 3
	nfDrop                   = 0
	generalHeader            = 4 // struct nfgenmsg
)

// parseStep reads what nftables says of a packet.
func parseStep(kind uint16, data []byte) (s step, ok bool) {
	if kind != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_TRACE || len(data) < generalHeader {
		return s, false
	}
	attributes, err := nl.ParseRouteAttr(data[generalHeader:])
	if err != nil {
		return s, false
	}
	s.family = nftables.TableFamily(data[0])
	number := func(value []byte) uint32 {
		if len(value) < 4 {
			return 1<<32 - 1
		}
		return binary.BigEndian.Uint32(value)
	}
	text := func(value []byte) string { return unix.ByteSliceToString(value) }
	var traced uint32
	code, policy := uint32(1<<32-1), uint32(1<<32-1)
	for _, a := range attributes {
		switch a.Attr.Type &^ unix.NLA_F_NESTED {
		case unix.NFTA_TRACE_TABLE:
			s.table = text(a.Value)
		case unix.NFTA_TRACE_CHAIN:
			s.chain = text(a.Value)
		case unix.NFTA_TRACE_RULE_HANDLE:
			if len(a.Value) == 8 {
				s.rule = binary.BigEndian.Uint64(a.Value)
			}
		case unix.NFTA_TRACE_TYPE:
			traced = number(a.Value)
		case unix.NFTA_TRACE_POLICY:
			policy = number(a.Value)
		case unix.NFTA_TRACE_VERDICT:
			inner, err := nl.ParseRouteAttr(a.Value)
			if err != nil {
				return s, false
			}
			for _, v := range inner {
				if v.Attr.Type == unix.NFTA_VERDICT_CODE {
					code = number(v.Value)
				}
			}
		}
	}
	switch traced {
	case tracedPolicy:
		s.dropped = policy == nfDrop
	case tracedRule:
		s.dropped = code == nfDrop
	}
	return s, true
}
