package plain

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
)

// observed writes a direction to an observer in pieces of a size, and returns what it was told.
func observed(text []byte, size int) string {
	var told, data bytes.Buffer
	o := Observer{
		Opened:    func(kind string, payload []byte) { fmt.Fprintf(&told, "open %q %q\n", kind, payload) },
		Requested: func(name string, payload []byte) { fmt.Fprintf(&told, "request %q %q\n", name, payload) },
		Data:      func(p []byte) { data.Write(p) },
		Foreign:   func() { fmt.Fprintln(&told, "foreign") },
	}
	for len(text) > 0 {
		part := text[:min(size, len(text))]
		_, _ = o.Write(part)
		text = text[len(part):]
	}
	return fmt.Sprintf("%sdata %q", told.String(), data.Bytes())
}

// What both ends of a channel say is read along.
func TestObserver(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	var sent bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(&sent, theirs)
	}()
	c := newChannel(half{ours})
	open := "\x02id\x04kindpayload"
	if err := c.write(frameOpen, []byte(open)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.SendRequest("exit-status", false, []byte{0, 0, 0, 3}); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Stderr().Write([]byte("oops")); err != nil {
		t.Fatal(err)
	}
	_ = ours.Close()
	<-done
	const want = "open \"kind\" \"payload\"\nrequest \"exit-status\" \"\\x00\\x00\\x00\\x03\"\ndata \"hellooops\""
	for _, size := range []int{1, 3, 1000} {
		if got := observed(sent.Bytes(), size); got != want {
			t.Errorf("in pieces of %d it is told %s, want %s", size, got, want)
		}
	}
	for _, foreign := range []string{"SSH-2.0-x\r\n", "O\xff\xff\xff\xff", "D\x00\x00\x00\x01xZ"} {
		if got := observed([]byte(foreign), 1); !bytes.Contains([]byte(got), []byte("foreign")) {
			t.Errorf("of %q it is told %s", foreign, got)
		}
	}
	for _, broken := range []string{"O\x00\x00\x00\x00", "O\x00\x00\x00\x01\x05", "Q\x00\x00\x00\x02\x05a", "Q\x00\x00\x00\x00"} {
		if got := observed([]byte(broken), 2); got != `data ""` {
			t.Errorf("of %q it is told %s", broken, got)
		}
	}
}

type half struct{ net.Conn }

func (half) CloseWrite() error { return nil }

// However a direction is cut into pieces, the observer is told the same, and it keeps no more than
// a frame.
func FuzzObserver(f *testing.F) {
	f.Add([]byte("O\x00\x00\x00\x0f\x02id\x04kindpayloadD\x00\x00\x00\x02hiQ\x00\x00\x00\x05\x04nameX\x00\x00\x00\x00"), 3)
	f.Add([]byte("SSH-2.0-OpenSSH\r\n"), 1)
	f.Add([]byte("E\x00\x00\x00\x01xA\x00\x00\x00\x00C\x00\x00\x00\x04\x00\x00\x00\x01R\x00\x00\x00\x02no"), 2)
	f.Fuzz(func(t *testing.T, text []byte, size int) {
		if whole, pieces := observed(text, len(text)+1), observed(text, max(1, size)); whole != pieces {
			t.Errorf("in pieces of %d it is told %s, and at once %s", size, pieces, whole)
		}
	})
}
