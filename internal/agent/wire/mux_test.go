package wire

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/hashicorp/yamux"
)

// recorder remembers how large the pieces were that were written.
type recorder struct {
	net.Conn
	mu     sync.Mutex
	pieces []int
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	r.pieces = append(r.pieces, len(p))
	r.mu.Unlock()
	return r.Conn.Write(p)
}

// What is sent arrives, and no header is sent without its body.
func TestWholeFrames(t *testing.T) {
	ours, theirs := net.Pipe()
	rec := &recorder{Conn: ours}
	client, err := yamux.Client(&WholeFrames{ReadWriteCloser: rec}, MuxConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	server, err := yamux.Server(&WholeFrames{ReadWriteCloser: theirs}, MuxConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	echoed := make(chan error, 1)
	go func() {
		stream, err := server.AcceptStream()
		if err == nil {
			_, err = io.Copy(stream, stream)
		}
		if err == nil {
			err = stream.Close()
		}
		echoed <- err
	}()
	stream, err := client.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	sizes := []int{1, frameHeader, 100, 70_000}
	for _, size := range sizes {
		sent := bytes.Repeat([]byte{byte(size)}, size)
		go func() { _, _ = stream.Write(sent) }()
		got := make([]byte, size)
		if _, err := io.ReadFull(stream, got); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("of %d bytes came back others: %v", size, err)
		}
	}
	if err := stream.Close(); err != nil {
		t.Error(err)
	}
	if err := <-echoed; err != nil {
		t.Error(err)
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	for _, size := range sizes {
		found := false
		for _, piece := range rec.pieces {
			found = found || piece == frameHeader+size
		}
		if !found {
			t.Errorf("%d bytes were not sent in one piece with their header: %d", size, rec.pieces)
		}
	}
}
