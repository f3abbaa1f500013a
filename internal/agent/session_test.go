package agent

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// A guest that runs and takes nothing is given up, one that is held is not: what waits
// goes on when the guest does (C2).
func TestStall(t *testing.T) {
	const stall = 5 * time.Millisecond
	for name, held := range map[string]bool{"running": false, "held": true} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			end := &sessionEnd{channel: ours, stall: stall}
			end.held.Store(held)
			written := make(chan error, 1)
			go func() {
				_, err := end.Write([]byte("hello"))
				written <- err
			}()
			if !held {
				if err := <-written; !errors.Is(err, errStalled) || !errors.Is(end.err(), errStalled) {
					t.Errorf("error is %v", err)
				}
				return
			}
			select {
			case err := <-written:
				t.Fatalf("a guest that is held was given up: %v", err)
			case <-time.After(3 * stallChecks * stall):
			}
			end.held.Store(false)
			got := make([]byte, 5)
			if _, err := io.ReadFull(theirs, got); err != nil || string(got) != "hello" {
				t.Errorf("the guest got %q, %v", got, err)
			}
			if err := <-written; err != nil {
				t.Error(err)
			}
		})
	}
}
