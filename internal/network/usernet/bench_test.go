package usernet

import (
	"io"
	"net"
	"testing"
)

// BenchmarkForward measures how fast a forward takes data to the guest. The guest's stack
// is ours as well, so a real guest is not as much slower as it may seem.
func BenchmarkForward(b *testing.B) {
	n := newNetwork(b)
	received := make(chan struct{})
	newGuest(b, n).listen(func(conn net.Conn) {
		_, _ = io.Copy(io.Discard, conn)
		close(received)
	})
	listener := listenHost(b)
	n.Forward(listener, echoPort)
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	chunk := make([]byte, 1<<20)
	b.SetBytes(int64(len(chunk)))
	for b.Loop() {
		if _, err := conn.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	_ = conn.Close()
	<-received
}
