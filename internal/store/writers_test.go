package store

import (
	"context"
	"database/sql"
	"sync/atomic"
	"testing"
)

// Who waits for writers reads what they have written, in whatever process.
func TestAwaitWriters(t *testing.T) {
	writer := openTemp(t, Options{})
	reader, err := Open(t.Context(), writer.Path(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Close() }()
	begun, end, written := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		written <- writer.update(context.Background(), func(*sql.Tx) error {
			close(begun)
			<-end
			return nil
		})
	}()
	<-begun
	var ended atomic.Bool
	waited := make(chan error, 1)
	go func() {
		err := reader.AwaitWriters(t.Context())
		if !ended.Load() {
			t.Error("it has not waited")
		}
		waited <- err
	}()
	brief, cancel := context.WithCancel(t.Context())
	cancel()
	if err := reader.AwaitWriters(brief); err == nil {
		t.Error("a wait that is given up succeeds")
	}
	ended.Store(true)
	close(end)
	for _, done := range []chan error{written, waited} {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
