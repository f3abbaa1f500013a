package tapnet

import (
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network"
)

// Registers of nftables have 16 bytes each. What is looked up as one key stands in several
// that follow each other: an interface's name fills the first.
const (
	first  = unix.NFT_REG_1
	second = unix.NFT_REG_2
)

// match is the expressions of a rule, which must all hold.
type match []expr.Any

// rule joins matches and what becomes of a packet that they all hold for.
func rule(parts ...match) match {
	var all match
	for _, part := range parts {
		all = append(all, part...)
	}
	return all
}

func load(key expr.MetaKey) expr.Any {
	return &expr.Meta{Key: key, Register: first}
}

func compare(op expr.CmpOp, data []byte) expr.Any {
	return &expr.Cmp{Op: op, Register: first, Data: data}
}

// fromGuests holds for packets that come in by the interface of a guest, and notFromGuests
// for all others. A name that is shorter than its register is a prefix.
func fromGuests() match { return byName(expr.MetaKeyIIFNAME, expr.CmpOpEq) }

func notFromGuests() match { return byName(expr.MetaKeyIIFNAME, expr.CmpOpNeq) }

// toGuests holds for packets that go out by the interface of a guest, and notToGuests for all
// others.
func toGuests() match { return byName(expr.MetaKeyOIFNAME, expr.CmpOpEq) }

func notToGuests() match { return byName(expr.MetaKeyOIFNAME, expr.CmpOpNeq) }

func byName(key expr.MetaKey, op expr.CmpOp) match {
	return match{load(key), compare(op, []byte(network.TAPPrefix))}
}

// version is one of the versions of IP, and where in its header the addresses are.
type version struct {
	proto                  byte
	from, to, length       uint32
	name                   string
	address                nftables.SetDatatype
	icmp, echo             byte
	sources, gateways      string // names of sets
	opened, closed, pooled string
	guests                 string
}

func ipv4() version {
	return version{
		proto: unix.NFPROTO_IPV4, from: 12, to: 16, length: 4, name: "ipv4", address: nftables.TypeIPAddr,
		icmp: unix.IPPROTO_ICMP, echo: 8,
		sources: "sources4", gateways: "gateways4", opened: "opened4", closed: "closed4", pooled: "pools4", guests: "guests4",
	}
}

func ipv6() version {
	return version{
		proto: unix.NFPROTO_IPV6, from: 8, to: 24, length: 16, name: "ipv6", address: nftables.TypeIP6Addr,
		icmp: unix.IPPROTO_ICMPV6, echo: 128,
		sources: "sources6", gateways: "gateways6", opened: "opened6", closed: "closed6", pooled: "pools6", guests: "guests6",
	}
}

// is holds for packets of a version.
func (v version) is() match {
	return match{load(expr.MetaKeyNFPROTO), compare(expr.CmpOpEq, []byte{v.proto})}
}

func (v version) payload(offset, register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: v.length}
}

// addressIn holds if the address at an offset of the header is in a set.
func (v version) addressIn(offset uint32, set string) match {
	return rule(v.is(), match{v.payload(offset, first), &expr.Lookup{SourceRegister: first, SetName: set}})
}

// guestAddressIn holds if the interface by which the packet came in, together with the
// address at an offset, is in a set, or if it is not.
func (v version) guestAddressIn(offset uint32, set string, not bool) match {
	return rule(v.is(), match{
		load(expr.MetaKeyIIFNAME), v.payload(offset, second),
		&expr.Lookup{SourceRegister: first, SetName: set, Invert: not},
	})
}

// addressNotIn holds if the address at an offset of the header is not in a set.
func (v version) addressNotIn(offset uint32, set string) match {
	return rule(v.is(), match{v.payload(offset, first), &expr.Lookup{SourceRegister: first, SetName: set, Invert: true}})
}

// guestAddressOut holds if the interface by which the packet goes out, together with the address
// at an offset, is not in a set.
func (v version) guestAddressOut(offset uint32, set string) match {
	return rule(v.is(), match{
		load(expr.MetaKeyOIFNAME), v.payload(offset, second),
		&expr.Lookup{SourceRegister: first, SetName: set, Invert: true},
	})
}

// icmpType holds for packets of ICMP of one of two types.
func (v version) icmpType(low, high byte) match {
	return rule(v.is(), match{
		load(expr.MetaKeyL4PROTO), compare(expr.CmpOpEq, []byte{v.icmp}),
		&expr.Payload{DestRegister: first, Base: expr.PayloadBaseTransportHeader, Len: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: first, FromData: []byte{low}, ToData: []byte{high}},
	})
}

// isQuestion holds for packets to a name server by a protocol.
func isQuestion(protocol byte) match {
	return rule(overProtocol(protocol), match{
		&expr.Payload{DestRegister: first, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		compare(expr.CmpOpEq, binaryutil.BigEndian.PutUint16(dnsPort)),
	})
}

// overProtocol holds for packets of a protocol over IP.
func overProtocol(protocol byte) match {
	return match{load(expr.MetaKeyL4PROTO), compare(expr.CmpOpEq, []byte{protocol})}
}

// beginsTCP holds for packets that begin a connection over TCP.
func beginsTCP() match {
	const flagsAt, syn, ack = 13, 0x02, 0x10
	return rule(overProtocol(unix.IPPROTO_TCP), match{
		&expr.Payload{DestRegister: first, Base: expr.PayloadBaseTransportHeader, Offset: flagsAt, Len: 1},
		&expr.Bitwise{SourceRegister: first, DestRegister: first, Len: 1, Mask: []byte{syn | ack}, Xor: []byte{0}},
		compare(expr.CmpOpEq, []byte{syn}),
	})
}

// carriedMark is the mark of packets that are given to the VM's shim, wherever they are to. It
// has none of the bits that Kubernetes, Tailscale and Cilium use.
const carriedMark = 0x736d2010

// carrierOf loads the port at which the shim takes the flows of the guest whose interface is a
// key, and holds if there is one.
func carrierOf(key expr.MetaKey) match {
	return match{load(key), &expr.Lookup{SourceRegister: first, DestRegister: first, IsDestRegSet: true, SetName: carriedMap}}
}

// toCarrier gives a packet to a socket of the shim: that which has its flow already, or else that
// at the gateway's address and the port that [carrierOf] has loaded. It does not hold if there is
// none.
func toCarrier(v version) match {
	return match{
		&expr.TProxy{Family: v.proto, TableFamily: unix.NFPROTO_INET, RegPort: first},
		&expr.Immediate{Register: first, Data: binaryutil.NativeEndian.PutUint32(carriedMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: first, SourceRegister: true},
	}
}

// isCarried holds for packets that were given to the shim.
func isCarried() match {
	return match{load(expr.MetaKeyMARK), compare(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(carriedMark))}
}

// guestIn holds if the interface of a key is in a set.
func guestIn(key expr.MetaKey, set string) match {
	return match{load(key), &expr.Lookup{SourceRegister: first, SetName: set}}
}

// inState holds for packets whose connection is in one of some states.
func inState(bits uint32) match {
	const bytes = 4
	return match{
		&expr.Ct{Key: expr.CtKeySTATE, Register: first},
		&expr.Bitwise{
			SourceRegister: first, DestRegister: first, Len: bytes,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: binaryutil.NativeEndian.PutUint32(0),
		},
		compare(expr.CmpOpNeq, binaryutil.NativeEndian.PutUint32(0)),
	}
}

// ofKnownFlow holds for packets of a connection that was allowed, or that is about one.
func ofKnownFlow() match { return inState(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED) }

// isAnswer holds for packets of a connection that the other side has begun.
func isAnswer() match {
	const reply = 1 // IP_CT_DIR_REPLY
	return match{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: first}, compare(expr.CmpOpEq, []byte{reply})}
}

// toNoRoute holds if the host has no route to the destination, or a local one.
func toNoRoute() match {
	return match{
		&expr.Fib{Register: first, ResultOIF: true, FlagDADDR: true, FlagPRESENT: true}, compare(expr.CmpOpEq, []byte{0}),
	}
}

// notToKind holds if the host's routes don't have the destination as of a kind.
func notToKind(kind uint32) match {
	return match{
		&expr.Fib{Register: first, ResultADDRTYPE: true, FlagDADDR: true},
		compare(expr.CmpOpNeq, binaryutil.NativeEndian.PutUint32(kind)),
	}
}

// toKind holds if the host's routes have the destination as of a kind (RTN_LOCAL, ...), or
// from the first to the last of several.
func toKind(low, high uint32) match {
	fib := &expr.Fib{Register: first, ResultADDRTYPE: true, FlagDADDR: true}
	if low == high {
		return match{fib, compare(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(low))}
	}
	return match{
		fib,
		// Numbers are compared as bytes, the first first.
		&expr.Byteorder{SourceRegister: first, DestRegister: first, Op: expr.ByteorderHton, Len: 4, Size: 4},
		&expr.Range{
			Op: expr.CmpOpEq, Register: first,
			FromData: binaryutil.BigEndian.PutUint32(low), ToData: binaryutil.BigEndian.PutUint32(high),
		},
	}
}

func verdict(kind expr.VerdictKind) match { return match{&expr.Verdict{Kind: kind}} }

func accept() match { return verdict(expr.VerdictAccept) }

func drop() match { return verdict(expr.VerdictDrop) }

func jump(chain string) match {
	return match{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

// reject tells the guest at once that it may not, as a firewall would.
func reject() match {
	const adminProhibited = 3 // NFT_REJECT_ICMPX_ADMIN_PROHIBITED
	return match{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: adminProhibited}}
}
