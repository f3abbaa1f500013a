package tapnet

import (
	"fmt"

	"github.com/vishvananda/netlink"

	"github.com/smolvm/smolvm/internal/network"
)

const (
	// burstTime is how long a guest may send or receive at any speed after it was idle, in
	// parts of a second: the tokens of a bucket.
	burstTime = 20
	// minBurst is the least that a bucket holds, in bytes: a packet that has been put
	// together from many (64 KiB) must fit.
	minBurst = 128 << 10
	// queueTime is how long packets to the guest wait for their turn at most, in parts of a
	// second.
	queueTime = 10
)

// MinRate is the least that a direction can be bounded to, in bits a second.
const MinRate = 8000

// checkRate returns why a rate can't be kept.
func checkRate(r network.Rate) error {
	for _, bits := range []uint64{r.ToGuest, r.FromGuest} {
		if bits != 0 && bits < MinRate {
			return fmt.Errorf("a rate of %d bits a second is too low; the lowest is %d", bits, MinRate)
		}
	}
	return nil
}

const bitsPerByte = 8

// shape bounds what goes out by an interface, to the guest, by a token bucket filter: packets
// wait for their turn. What comes from the guest can't wait, and is dropped in the table
// beyond the rate (see [addPort]): the traffic control that does that, act_police, is a module
// that not every kernel has.
func shape(handle *netlink.Handle, link netlink.Link, bits uint64) error {
	if bits == 0 {
		return nil
	}
	rate := bits / bitsPerByte
	burst := uint32(min(max(rate/burstTime, minBurst), 1<<30))
	// In ticks of the kernel's scheduler, which TickInUsec converts.
	buffer := float64(burst) / float64(rate) * netlink.TIME_UNITS_PER_SEC * netlink.TickInUsec()
	limit := rate/queueTime + uint64(burst)
	qdisc := &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate, Buffer: uint32(min(buffer, 1<<32-1)), Limit: uint32(min(limit, 1<<31)),
	}
	if err := handle.QdiscReplace(qdisc); err != nil {
		return fmt.Errorf("bound the rate of interface %s: %w", link.Attrs().Name, err)
	}
	return nil
}
