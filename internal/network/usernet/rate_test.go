package usernet

import (
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/smolvm/smolvm/internal/network"
)

func TestBucket(t *testing.T) {
	const rate = 8_000_000 // a million bytes a second
	began := time.Unix(1, 0)
	for name, test := range map[string]struct {
		take []int // bytes, one second apart
		want []time.Duration
	}{
		"burst":               {[]int{minBurst}, []time.Duration{0}},
		"beyond the burst":    {[]int{minBurst + 1_000_000}, []time.Duration{time.Second}},
		"a debt is paid":      {[]int{minBurst + 1_500_000, 0}, []time.Duration{1500 * time.Millisecond, 500 * time.Millisecond}},
		"and not forgotten":   {[]int{minBurst + 2_000_000, 500_000}, []time.Duration{2 * time.Second, 1500 * time.Millisecond}},
		"idleness saves more": {[]int{0, 0, 0, minBurst + 1_000_000}, []time.Duration{0, 0, 0, time.Second}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBucket(rate)
			for i, bytes := range test.take {
				got := b.take(began.Add(time.Duration(i)*time.Second), bytes)
				if d := got - test.want[i]; d < -time.Microsecond || d > time.Microsecond {
					t.Errorf("number %d waits %s, want %s", i, got, test.want[i])
				}
			}
		})
	}
	if newBucket(0) != nil || newPace(network.Rate{}) != nil {
		t.Error("there is a bound where none was asked for")
	}
}

func packetOf(size int) *stack.PacketBuffer {
	return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(make([]byte, size))})
}

// Frames for the guest keep their order and their rate, and those that would wait for too long
// are dropped.
func TestPace(t *testing.T) {
	const frame = 1000
	p := newPace(network.Rate{ToGuest: 4_000_000}) // half a million bytes a second
	var written atomic.Int64
	done := make(chan struct{})
	put := func(count int) {
		for range count {
			packet := packetOf(frame)
			p.put(packet)
			packet.DecRef()
		}
	}
	put(1000) // before anybody takes any: what waits is bounded
	waiting := len(p.queue)
	if most := p.room / frame; waiting != most {
		t.Fatalf("%d frames wait, want %d", waiting, most)
	}
	p.toGuest.has = 0 // nothing may pass at once
	began := time.Now()
	go func() {
		defer close(done)
		p.serve(func(packet *stack.PacketBuffer) {
			if packet.Size() == frame {
				written.Add(1)
			}
			if written.Load() == int64(waiting) {
				p.close()
			}
		})
	}()
	<-done
	// It may take longer on a busy host, but never less.
	least := time.Duration(float64(waiting*frame) / 500_000 * float64(time.Second))
	if took := time.Since(began); took < least-time.Millisecond {
		t.Errorf("%d frames took %s, want at least %s", waiting, took, least)
	}
	put(10) // nobody takes them any more
	p.drop()
	if len(p.queue) > 0 {
		t.Error("frames are left in the queue")
	}
}

// A network that is claimed for a VM with a rate keeps it from then on.
func TestClaimWithRate(t *testing.T) {
	n := newNetwork(t)
	if n.endpoint.pace.Load() != nil {
		t.Error("there is a bound before")
	}
	config := n.config
	config.GuestMAC, config.Rate = "02:00:ac:10:00:09", network.Rate{ToGuest: 1_000_000, FromGuest: 2_000_000}
	if err := n.Claim(t.Context(), config, "vm"); err != nil {
		t.Fatal(err)
	}
	p := n.endpoint.pace.Load()
	if p == nil || p.toGuest.perSecond != 125_000 || p.fromGuest.perSecond != 250_000 {
		t.Errorf("bounds afterwards: %+v", p)
	}
	if got := n.filter.Load(); got.guestMAC.String() != config.GuestMAC {
		t.Errorf("the guest's address is %v", got.guestMAC)
	}
}
