package usernet

import (
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/smolvm/smolvm/internal/network"
)

const (
	// burstTime is how long a guest may send or receive at any speed after it was idle.
	burstTime = time.Second / 20
	// minBurst is the least that passes at once then, in bytes.
	minBurst = 64 << 10
	// queueTime is how long frames to the guest wait for their turn at most.
	queueTime = time.Second / 10
	// minQueue is the least that waits, in bytes.
	minQueue = 64 << 10

	bitsPerByte = 8
)

// pace bounds what passes in both directions of a link. What the guest sends waits in the link,
// so the guest waits; what it is sent waits in a queue, and is lost if that is full.
type pace struct {
	fromGuest, toGuest *bucket // nil: no bound
	queue              chan *stack.PacketBuffer
	room               int // in the queue, in bytes
	done               chan struct{}
	end                sync.Once

	mu     sync.Mutex // guards the following
	queued int        // bytes in the queue
}

// newPace returns what keeps a rate; nil: there is none to keep.
func newPace(rate network.Rate) *pace {
	if rate == (network.Rate{}) {
		return nil
	}
	p := &pace{done: make(chan struct{}), fromGuest: newBucket(rate.FromGuest), toGuest: newBucket(rate.ToGuest)}
	if p.toGuest != nil {
		p.room = max(minQueue, int(p.toGuest.perSecond*queueTime.Seconds()))
		p.queue = make(chan *stack.PacketBuffer, p.room/minFrame+1)
	}
	return p
}

// minFrame is the least that a frame takes on Ethernet, in bytes.
const minFrame = 64

// close lets whoever waits go on. Nil has nobody who does.
func (p *pace) close() {
	if p != nil {
		p.end.Do(func() { close(p.done) })
	}
}

// wait waits until so many bytes of the guest's may pass.
func (p *pace) wait(b *bucket, bytes int) {
	d := b.take(time.Now(), bytes)
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-p.done:
	}
}

// put puts a frame for the guest into the queue, or drops it.
func (p *pace) put(packet *stack.PacketBuffer) {
	size := max(packet.Size(), minFrame)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.queued+size > p.room {
		return
	}
	select {
	case p.queue <- packet.IncRef():
		p.queued += size
	default: // can't be, as the queue has room for so many of the least size
		packet.DecRef()
	}
}

// serve writes the frames of the queue, each in its turn, until the pace is closed.
func (p *pace) serve(write func(*stack.PacketBuffer)) {
	for {
		select {
		case packet := <-p.queue:
			size := max(packet.Size(), minFrame)
			p.mu.Lock()
			p.queued -= size
			p.mu.Unlock()
			p.wait(p.toGuest, size)
			write(packet)
			packet.DecRef()
		case <-p.done:
			p.drop()
			return
		}
	}
}

// drop drops what is in the queue.
func (p *pace) drop() {
	for {
		select {
		case packet := <-p.queue:
			packet.DecRef()
		default:
			return
		}
	}
}

// bucket is a token bucket. It lends: what is taken beyond it is waited for afterwards.
type bucket struct {
	perSecond, size float64 // in bytes

	mu   sync.Mutex // guards the following
	has  float64
	then time.Time
}

// newBucket returns a full bucket that is filled by so many bits a second; nil for 0.
func newBucket(bits uint64) *bucket {
	if bits == 0 {
		return nil
	}
	b := &bucket{perSecond: float64(bits) / bitsPerByte}
	b.size = max(minBurst, b.perSecond*burstTime.Seconds())
	b.has = b.size
	return b
}

// take takes so many bytes, and returns how long to wait for them.
func (b *bucket) take(now time.Time, bytes int) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.then.IsZero() {
		b.has = min(b.size, b.has+max(0, now.Sub(b.then).Seconds())*b.perSecond)
	}
	b.then = now
	if b.has -= float64(bytes); b.has >= 0 {
		return 0
	}
	return time.Duration(-b.has / b.perSecond * float64(time.Second))
}
