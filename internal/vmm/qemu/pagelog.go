package qemu

import (
	"errors"
	"math"
	"math/rand/v2"
)

const (
	// lookStep is after how many pages QEMU is asked whether it has looked again.
	lookStep = 2048
	// maxUnsafe is how many pages may come after that until the guest is held at all
	// costs: to read them once more takes some 30 ms.
	maxUnsafe = 16384
	// sampleSize is how many pages of a kind are compared that can't differ.
	sampleSize = 64
)

// errNeverDone is unlikely: 16 TiB have come by then.
var errNeverDone = errors.New("the guest changes its memory faster than it is saved")

// pageLog remembers when each page of a guest's memory came last, to tell the copies
// that may be out of date when the guest is held.
//
// Under emulation QEMU does not notice all that a guest writes. A store marks its page as
// changed, and takes the flag off the CPU's entry for that page in its TLB that makes
// stores do so. When QEMU looks what has changed, it takes the marks away, but leaves the
// entries as they are: what a CPU writes through such an entry after that is marked no
// more. (So up to 8.2. Later ones put the flags back, but a CPU may take one off again
// right after that.) It does no harm as long as the page is sent after the last such
// write, that is, while the guest is held.
//
// Which copies that leaves in doubt follows from what QEMU does:
//
//   - Its first look is safe. It comes with the start of the logging, which empties all
//     TLBs, and before a page is read each CPU has left the code that it was in. So a page
//     that is written to after its first copy was read gets a mark.
//   - No mark is taken away between the first look and the second, which finds them all.
//     Those pages are sent again, now or while the guest is held.
//   - So a copy is in doubt only if it was read after the second look, and while the guest
//     ran. Copies read while it is held are right.
//
// QEMU counts its looks, before it takes marks away. A copy that has come here before we
// asked for the count, and got the answer one, was read before the second look. All others
// that came while the guest ran are unsafe: some more than need be, but all that can be.
type pageLog struct {
	// live is how many pages have come while the guest ran, each as often as it came.
	live uint32
	// safe is how many of them came before QEMU can have looked a second time.
	safe uint32
	// look reports whether QEMU has not looked a second time yet. Nil: it has, or it is
	// all the same.
	look func() looks
	// enough is called once there are maxUnsafe; it may be nil.
	enough func()
	// last has for each page what live was when it came. It is 0 if the page has not
	// come, or came while the guest was held.
	last []uint32
	// final are pages that came while the guest was held, at most sampleSize of them.
	final []int64
}

// looks is what is known of how often QEMU has looked what a guest has changed.
type looks int

const (
	looksUnknown looks = iota
	lookedOnce         // or not at all
	lookedAgain
)

// note notes a page that has come.
func (l *pageLog) note(page int64, held bool) error {
	if held {
		l.last[page] = 0
		if len(l.final) < sampleSize {
			l.final = append(l.final, page*ramPageSize)
		}
		return nil
	}
	if l.live == math.MaxUint32 {
		return errNeverDone
	}
	l.live++
	l.last[page] = l.live
	if l.look != nil && l.live%lookStep == 0 {
		switch l.look() {
		case lookedOnce:
			l.safe = l.live
		case lookedAgain:
			l.look = nil
		case looksUnknown:
		}
	}
	if l.enough != nil && l.look == nil && l.live-l.safe > maxUnsafe {
		l.enough()
		l.enough = nil
	}
	return nil
}

// unsafe returns the offsets of the pages whose copies may be out of date.
func (l *pageLog) unsafe() []int64 {
	var offsets []int64
	for page, n := range l.last {
		if n > l.safe {
			offsets = append(offsets, int64(page)*ramPageSize)
		}
	}
	return offsets
}

// sample returns the offsets of some pages whose copies are right, of both kinds, drawn at
// random. Holes are left out, as they prove little.
func (l *pageLog) sample(hole func(page int64) bool) []int64 {
	offsets := l.final
	pages := int64(len(l.last))
	step := max(pages/sampleSize, 1)
	for from := rand.Int64N(step); from < pages; from += step {
		for page := from; page < min(from+step, pages); page++ {
			if n := l.last[page]; n > 0 && n <= l.safe && !hole(page) {
				offsets = append(offsets, page*ramPageSize)
				break
			}
		}
	}
	return offsets
}
