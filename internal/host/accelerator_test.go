package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// newTestHost returns a Host which sees these files, and nothing else, and is an
// ordinary user's.
func newTestHost(t *testing.T, files map[string]string) *Host {
	t.Helper()
	h := New(Options{CacheDir: filepath.Join(t.TempDir(), "cache")})
	h.root, h.uid, h.groups = t.TempDir(), 1000, []int{1000}
	for name, text := range files {
		path := h.path(name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

const bootID = "proc/sys/kernel/random/boot_id"

func TestAcceleratorOfThisHost(t *testing.T) {
	t.Parallel()
	cache := t.TempDir()
	first := New(Options{CacheDir: cache}).Accelerator(t.Context())
	switch {
	case first.Name == KVM && first.Reason == "":
	case first.Name == TCG && first.Reason != "":
	default:
		t.Errorf("Accelerator = %+v, want KVM without a reason or TCG with one", first)
	}
	if second := New(Options{CacheDir: cache}).Accelerator(t.Context()); second != first {
		t.Errorf("Accelerator = %+v at first, then %+v", first, second)
	}
	t.Logf("%+v", first)
}

func TestAcceleratorWithoutKVM(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		files map[string]string
		want  string
	}{
		"no device":    {nil, "no /dev/kvm"},
		"not a device": {map[string]string{kvmDevice: "", bootID: "boot"}, "is not KVM"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newTestHost(t, test.files)
			got := h.Accelerator(t.Context())
			if got.Name != TCG || !strings.Contains(got.Reason, test.want) {
				t.Errorf("Accelerator = %+v, want TCG because of %q", got, test.want)
			}
			if entries, err := os.ReadDir(h.cacheDir); err == nil {
				t.Errorf("what may pass has been kept: %v", entries)
			}
		})
	}
}

func TestAcceleratorCancelled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	h := New(Options{CacheDir: t.TempDir()})
	requireKVM(t)
	got := h.Accelerator(ctx)
	if got.Name != TCG || !strings.Contains(got.Reason, context.Canceled.Error()) {
		t.Errorf("Accelerator of a cancelled call = %+v", got)
	}
	if h.known != nil {
		t.Errorf("a cancelled probe is kept: %+v", h.known)
	}
}

func TestCache(t *testing.T) {
	t.Parallel()
	h := newTestHost(t, map[string]string{kvmDevice: "", bootID: "boot 1\n"})
	key, err := h.key(h.path(kvmDevice))
	if err != nil {
		t.Fatal(err)
	}
	// another is a later process on the same host.
	another := func() *Host { return &Host{cacheDir: h.cacheDir, root: h.root, probe: probe} }

	h.remember(key, measured{}, errors.New("too slow"))
	if got := another().Accelerator(t.Context()); got != (Accelerator{TCG, "too slow", EmulationFactor}) {
		t.Errorf("what is known is not used: %+v", got)
	}
	h.remember(key, measured{Exit: 3 * usualExit}, nil)
	if got := another().Accelerator(t.Context()); got != (Accelerator{Name: KVM, Slowness: 3}) {
		t.Errorf("what is known is not used: %+v", got)
	}
	if _, got := another().probeKVM(t.Context(), false); got == nil {
		t.Error("Check does not probe afresh")
	}

	for name, spoil := range map[string]func() error{
		"another boot":   func() error { return os.WriteFile(h.path(bootID), []byte("boot 2"), 0o600) },
		"another device": func() error { return replace(h.path(kvmDevice)) },
		"damaged cache":  func() error { return os.WriteFile(filepath.Join(h.cacheDir, cacheName), []byte("{"), 0o600) },
	} {
		h.remember(key, measured{Exit: 3 * usualExit}, nil)
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if got := another().Accelerator(t.Context()); got.Name != TCG {
			t.Errorf("%s: Accelerator = %+v, want what a probe finds", name, got)
		}
	}
	if entries, err := os.ReadDir(h.cacheDir); err != nil || len(entries) != 1 {
		t.Errorf("the cache has files %v (%v), want one", entries, err)
	}
}

// replace makes a file anew; the old one goes last, lest its inode be used again.
func replace(path string) error {
	if err := os.WriteFile(path+".new", nil, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func TestAcceleratorConcurrently(t *testing.T) {
	t.Parallel()
	h := New(Options{})
	got := make([]Accelerator, 8)
	var group sync.WaitGroup
	for i := range got {
		group.Go(func() { got[i] = h.Accelerator(t.Context()) })
	}
	group.Wait()
	for _, one := range got {
		if one != got[0] {
			t.Errorf("Accelerator = %+v and %+v", got[0], one)
		}
	}
}

func requireKVM(t *testing.T) string {
	t.Helper()
	const device = "/dev/kvm"
	file, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Skip("KVM can't be opened: ", err)
	}
	_ = file.Close()
	return device
}

// Limits of time follow what a probe has measured, which is kept for the host's boot.
func TestSlowness(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		exit time.Duration
		loop time.Duration
		err  error
		kvm  float64
		best string
	}{
		"plain":        {2 * time.Microsecond, time.Millisecond, nil, 1, KVM},
		"busy":         {usualExit, usualLoop, nil, 1, KVM},
		"not measured": {0, 0, nil, 1, KVM},
		"nested":       {4 * usualExit, usualLoop, nil, 4, KVM},
		"slow CPU":     {usualExit, 3 * usualLoop, nil, 3, KVM},
		"no end":       {time.Second, 0, nil, maxSlowness, KVM},
		"too slow":     {0, 0, &slowError{1, 100}, EmulationFactor, TCG},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newTestHost(t, map[string]string{kvmDevice: "", bootID: "boot"})
			probes := 0
			h.probe = func(string, int, time.Duration) (measured, error) {
				probes++
				return measured{Loop: test.loop, Exit: test.exit}, test.err
			}
			for _, host := range []*Host{h, {cacheDir: h.cacheDir, root: h.root, probe: h.probe}} {
				best := host.Accelerator(t.Context())
				if got := host.Slowness(t.Context(), KVM); best.Name != test.best || got != test.kvm || best.Slowness != got {
					t.Errorf("the best is %+v, and KVM's slowness %v, want %v", best, got, test.kvm)
				}
				if got := host.Slowness(t.Context(), TCG); got != EmulationFactor {
					t.Errorf("slowness of emulation is %v", got)
				}
			}
			if probes != 1 {
				t.Errorf("KVM was probed %d times", probes)
			}
		})
	}
}
