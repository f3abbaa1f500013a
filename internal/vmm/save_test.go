package vmm

import (
	"context"
	"errors"
	"testing"
	"time"
)

// A hold ends once, by the first call that ends it, and what has to be undone is undone even
// if the guest can't go on.
func TestHold(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	for name, test := range map[string]struct {
		held            bool
		resume          error
		keep            bool
		resumes         int
		wantHeld, wantE bool
	}{
		"released":              {resumes: 1, wantHeld: true},
		"released, but fails":   {resume: broken, resumes: 1, wantHeld: true, wantE: true},
		"held before, released": {held: true},
		"kept":                  {keep: true},
	} {
		resumes, ends := 0, 0
		hold := NewHold(Saved{Held: test.held}, time.Now().Add(-time.Second), func(ctx context.Context) error {
			resumes++
			return errors.Join(ctx.Err(), test.resume)
		}, func() { ends++ })
		if test.keep {
			hold.Keep()
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // the guest is to go on all the same
		held, err := hold.Release(ctx)
		if (held >= time.Second) != test.wantHeld || errors.Is(err, broken) != test.wantE || err != nil && !test.wantE {
			t.Errorf("%s: Release = %v, %v", name, held, err)
		}
		again, err := hold.Release(ctx)
		hold.Keep()
		if again != 0 || err != nil || resumes != test.resumes || ends != 1 {
			t.Errorf("%s: again %v, %v; it was resumed %d times and ended %d times", name, again, err, resumes, ends)
		}
	}
}

func TestCheckOverlays(t *testing.T) {
	t.Parallel()
	c := Config{Drives: []Drive{{}, {ReadOnly: true}, {}}}
	for name, test := range map[string]struct {
		drives []int
		ok     bool
	}{
		"none":       {nil, true},
		"two":        {[]int{2, 0}, true},
		"twice":      {[]int{0, 2, 0}, false},
		"read-only":  {[]int{1}, false},
		"beyond":     {[]int{3}, false},
		"before all": {[]int{-1}, false},
	} {
		var overlays []Overlay
		for _, n := range test.drives {
			overlays = append(overlays, Overlay{Drive: n, Path: "/overlay"})
		}
		if err := c.CheckOverlays(overlays); (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
