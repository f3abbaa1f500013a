package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/hashicorp/yamux"
)

func frame(kind byte, flags uint16, id, length uint32, body ...byte) []byte {
	b := make([]byte, frameHeader)
	b[1] = kind
	binary.BigEndian.PutUint16(b[2:], flags)
	binary.BigEndian.PutUint32(b[4:], id)
	binary.BigEndian.PutUint32(b[8:], length)
	return append(b, body...)
}

// guardOf returns a guard over what a guest sends, with streams 1 and 3 open.
func guardOf(t testing.TB, guest []byte, one bool) *Guard {
	t.Helper()
	var r io.Reader = bytes.NewReader(guest)
	if one {
		r = iotest.OneByteReader(r)
	}
	guard := &Guard{ReadWriteCloser: struct {
		io.Reader
		io.WriteCloser
	}{r, nopWriteCloser{}}}
	for _, id := range []uint32{1, 3} {
		if _, err := guard.Write(frame(frameWindowUpdate, flagSYN, id, maxWindow-initialWindow)); err != nil {
			t.Fatal(err)
		}
	}
	return guard
}

type nopWriteCloser struct{}

func (nopWriteCloser) Write(p []byte) (int, error) { return len(p), nil }
func (nopWriteCloser) Close() error                { return nil }

// A guest may do what an agent does, and nothing else (S3, S4).
func TestGuard(t *testing.T) {
	hello := frame(frameWindowUpdate, flagACK, 1, maxWindow-initialWindow)
	for name, test := range map[string]struct {
		good, bad []byte
		text      string
	}{
		"an honest guest":      {good: bytes.Join([][]byte{hello, frame(frameData, 0, 1, 3, 'a', 'b', 'c'), frame(frameData, flagACK, 3, 2, 0, 2), frame(frameWindowUpdate, flagFIN, 1, 0)}, nil)},
		"data after the end":   {good: bytes.Join([][]byte{hello, frame(frameWindowUpdate, flagFIN, 1, 0), frame(frameData, 0, 1, 1, 'x')}, nil)},
		"data after a reset":   {good: bytes.Join([][]byte{hello, frame(frameWindowUpdate, flagRST, 1, 0), frame(frameData, 0, 1, 1, 'x'), frame(frameWindowUpdate, 0, 1, 5)}, nil)},
		"ping":                 {hello, frame(framePing, flagSYN, 0, 1), "it pings"},
		"answer to a ping":     {hello, frame(framePing, flagACK, 0, 1), "it pings"},
		"go away":              {hello, frame(frameGoAway, 0, 0, 0), "ends the session"},
		"a stream of its own":  {hello, frame(frameWindowUpdate, flagSYN, 2, 0), "opens stream 2"},
		"ours once more":       {hello, frame(frameData, flagSYN, 1, 0), "opens stream 1"},
		"no such stream":       {hello, frame(frameData, 0, 5, 0), "never opened"},
		"its side's stream":    {hello, frame(frameData, 0, 2, 0), "never opened"},
		"stream 0":             {hello, frame(frameData, 0, 0, 0), "never opened"},
		"unknown type":         {hello, frame(4, 0, 1, 0), "type 4"},
		"unknown version":      {hello, append([]byte{1}, frame(frameData, 0, 1, 0)[1:]...), "version 1"},
		"unknown flags":        {hello, frame(frameData, 16, 1, 0), "flags 0x10"},
		"huge frame":           {hello, frame(frameData, 0, 1, 1<<32-1), "4294967295 bytes"},
		"huge late frame":      {frame(frameWindowUpdate, flagRST, 1, 0), frame(frameData, 0, 1, maxWindow+1), "bytes"},
		"more than the window": {append(frame(frameData, 0, 1, maxWindow), make([]byte, maxWindow)...), frame(frameData, 0, 1, 1), "where 0 are allowed"},
		"window too wide":      {hello, frame(frameWindowUpdate, 0, 1, 1), "opens the window"},
		"window overflows":     {hello, frame(frameWindowUpdate, 0, 1, 1<<32-1), "bytes"},
		"accepted twice":       {hello, frame(frameWindowUpdate, flagACK, 1, 0), "accepts stream 1 twice"},
		"closed twice":         {append(bytes.Clone(hello), frame(frameWindowUpdate, flagFIN, 1, 0)...), frame(frameWindowUpdate, flagFIN, 1, 0), "closes stream 1 twice"},
	} {
		for _, one := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				guard := guardOf(t, append(bytes.Clone(test.good), test.bad...), one)
				got, err := io.ReadAll(guard)
				if test.bad == nil {
					if err != nil || guard.Err() != nil || !bytes.Equal(got, test.good) {
						t.Errorf("an honest guest's %d bytes came as %d, with %v", len(test.good), len(got), err)
					}
					return
				}
				if !errors.Is(err, ErrProtocol) || !errors.Is(guard.Err(), ErrProtocol) || !strings.Contains(err.Error(), test.text) {
					t.Errorf("error is %v, want %q", err, test.text)
				}
				// With single bytes, those of a header come before the verdict on it.
				if whole := got[:min(len(got), len(test.good))]; !bytes.Equal(whole, test.good) || len(got) >= len(test.good)+frameHeader {
					t.Errorf("%d bytes were passed on, want %d", len(got), len(test.good))
				}
				if n, err := guard.Read(make([]byte, 1)); n != 0 || err == nil {
					t.Errorf("after that there is more: %d, %v", n, err)
				}
			})
		}
	}
}

// What both ends of yamux send to each other is fine, whoever closes first, and of
// streams that are over nothing is kept.
func TestGuardKeepsNothing(t *testing.T) {
	ours, theirs := net.Pipe()
	guard := &Guard{ReadWriteCloser: ours}
	client, err := yamux.Client(&WholeFrames{ReadWriteCloser: guard}, HostMuxConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	server, err := yamux.Server(&WholeFrames{ReadWriteCloser: theirs}, MuxConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	go func() {
		for {
			stream, err := server.AcceptStream()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(stream, stream)
				_ = stream.Close()
			}()
		}
	}()
	for i := range 50 {
		stream, err := client.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		sent := bytes.Repeat([]byte{byte(i)}, 100_000*(i%20))
		go func() {
			_, _ = stream.Write(sent)
			_ = stream.Close()
		}()
		if got, err := io.ReadAll(stream); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("of %d bytes came back %d: %v (%v)", len(sent), len(got), err, guard.Err())
		}
	}
	guard.mu.Lock()
	defer guard.mu.Unlock()
	if len(guard.streams) > 0 || guard.broken != nil {
		t.Errorf("%d streams are kept, %v", len(guard.streams), guard.broken)
	}
}

// Whatever a guest sends, what yamux gets to see of it is whole frames that keep the rules.
func FuzzGuard(f *testing.F) {
	f.Add(frame(frameData, flagACK, 1, 2, 'a', 'b'), false)
	f.Add(append(frame(frameWindowUpdate, flagACK, 3, 7), frame(framePing, flagSYN, 0, 0)...), true)
	f.Add(append(frame(frameData, flagFIN, 1, 0), frame(frameWindowUpdate, flagRST, 3, 0)...), true)
	f.Fuzz(func(t *testing.T, guest []byte, one bool) {
		guard := guardOf(t, guest, one)
		got, err := io.ReadAll(guard)
		if !bytes.HasPrefix(guest, got) || (err == nil) != (len(got) == len(guest)) {
			t.Fatalf("of %d bytes %d came, with %v", len(guest), len(got), err)
		}
		if len(guard.streams) > 2 {
			t.Fatalf("%d streams are kept", len(guard.streams))
		}
		received := map[uint32]uint64{}
		for len(got) >= frameHeader {
			id, length := binary.BigEndian.Uint32(got[4:]), binary.BigEndian.Uint32(got[8:])
			if got[0] != 0 || got[1] > frameWindowUpdate || got[3]&flagSYN != 0 || id != 1 && id != 3 || length > maxWindow {
				t.Fatalf("frame %x was passed on", got[:frameHeader])
			}
			size := uint64(frameHeader)
			if got[1] == frameData {
				size += uint64(length)
				received[id] += uint64(length)
			}
			got = got[min(size, uint64(len(got))):]
		}
		for id, bytes := range received {
			if bytes > maxWindow && guard.streams[id] != nil {
				t.Fatalf("stream %d has %d bytes, and was allowed %d", id, bytes, maxWindow)
			}
		}
	})
}
