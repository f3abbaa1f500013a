package plain

import (
	"io"
	"net"
	"sync"

	"golang.org/x/crypto/ssh"
)

// Join accepts a channel of any kind, and copies between it and a connection until both
// directions have ended. It closes both.
func Join(asked ssh.NewChannel, conn net.Conn) {
	defer func() { _ = conn.Close() }()
	channel, requests, err := asked.Accept()
	if err != nil {
		return
	}
	defer func() { _ = channel.Close() }()
	go ssh.DiscardRequests(requests)
	var both sync.WaitGroup
	both.Go(func() {
		_, _ = io.Copy(conn, channel)
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
	})
	both.Go(func() {
		_, _ = io.Copy(channel, conn)
		_ = channel.CloseWrite()
	})
	both.Wait()
}
