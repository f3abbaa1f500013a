package policytest

import (
	"crypto/tls"
	"net"
	"testing"
	"time"
)

// ClientHello returns what Go's own client of TLS sends first, with a name; empty: without SNI.
func ClientHello(t testing.TB, name string) []byte {
	t.Helper()
	client, server := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tls.Client(client, &tls.Config{ServerName: name, InsecureSkipVerify: true}).HandshakeContext(t.Context()) //nolint:gosec // Nobody is on the other side.
	}()
	if err := server.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	first := make([]byte, 16<<10)
	size, err := server.Read(first)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = client.Close(), server.Close()
	<-done
	return first[:size]
}
