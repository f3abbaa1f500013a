package host

import (
	"errors"
	"os"
	"testing"
	"time"
	"unsafe"
)

// The kernel writes as many bytes as the request's number says.
func TestStructSizes(t *testing.T) {
	size := func(request uintptr) uintptr { return request >> 16 & 0x3fff }
	for _, test := range []struct {
		name      string
		got, want uintptr
	}{
		{"kvm_userspace_memory_region", unsafe.Sizeof(userMemoryRegion{}), size(kvmSetUserMemoryRegion)},
		{"kvm_regs", unsafe.Sizeof(regs{}), size(kvmGetRegs)},
		{"kvm_sregs", unsafe.Sizeof(sregs{}), size(kvmGetSregs)},
	} {
		if test.got != test.want {
			t.Errorf("struct %s has %d bytes, want %d", test.name, test.got, test.want)
		}
	}
}

// Both ends of the probe are tested on whatever KVM there is: a loop that even a
// slow one ends, and one that even a fast one does not.
func TestProbe(t *testing.T) {
	t.Parallel()
	device := requireKVM(t)
	const short, long = 10, 1<<31 - 1

	t.Run("ends", func(t *testing.T) {
		speed, err := probe(device, short, time.Minute)
		if err != nil || speed.Loop <= 0 || speed.Exit <= 0 || speed.Exit > speed.Loop+time.Minute {
			t.Errorf("probe of %d iterations: %+v, %v", short, speed, err)
		}
		t.Logf("%+v", speed)
	})
	t.Run("cut off", func(t *testing.T) {
		_, err := probe(device, long, 20*time.Millisecond)
		slow, ok := errors.AsType[*slowError](err)
		if !ok {
			t.Fatalf("probe of %d iterations: %v, want a slowError", long, err)
		}
		if slow.done <= 0 || slow.done >= slow.of || slow.of != long {
			t.Errorf("the guest did %d of %d iterations", slow.done, slow.of)
		}
	})
	t.Run("cut off at once", func(t *testing.T) {
		_, err := probe(device, long, 0)
		if _, ok := errors.AsType[*slowError](err); !ok {
			t.Errorf("probe without time: %v, want a slowError", err)
		}
	})
}

func TestProbeLeavesNothing(t *testing.T) {
	device := requireKVM(t)
	open := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	if _, err := probe(device, 10, time.Minute); err != nil {
		t.Skip("KVM does not work: ", err)
	}
	before := open()
	for range 5 {
		_, _ = probe(device, 10, time.Minute)
	}
	if after := open(); after != before {
		t.Errorf("%d files are open after probing, %d before", after, before)
	}
}
