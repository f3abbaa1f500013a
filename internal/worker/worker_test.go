package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/flock"
)

// orders are what the workers of these tests are told.
type orders struct {
	// Make is the id of what is made. Empty: it fails, as there is no room.
	Make string `json:"make"`
	// Await is a FIFO from which the worker reads before that; empty: it does not wait.
	Await string `json:"await"`
	// Wrote is a file that it writes at its end; empty: none.
	Wrote string `json:"wrote"`
}

// TestMain makes this program its own worker.
func TestMain(m *testing.M) {
	if os.Args[len(os.Args)-1] != argument {
		os.Exit(m.Run())
	}
	var o orders
	err := Serve(context.Background(), os.Stdin, &o, func(context.Context) (string, error) {
		if o.Await != "" {
			if _, err := os.ReadFile(o.Await); err != nil {
				return "", err
			}
		}
		if o.Make == "" {
			return "", fmt.Errorf("make it: %w", smolvm.ErrDiskBudget)
		}
		if o.Wrote != "" {
			return o.Make, os.WriteFile(o.Wrote, nil, 0o600)
		}
		return o.Make, nil
	})
	if err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func start(t *testing.T, o any, lock *os.File) *Worker {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w, err := Start(t.Context(), Options{Program: []string{self}, Orders: o, LogPath: filepath.Join(t.TempDir(), "log"), Lock: lock})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestWait(t *testing.T) {
	t.Parallel()
	id, err := start(t, orders{Make: "this"}, nil).Wait(t.Context())
	if id != "this" || err != nil {
		t.Errorf("it has made %q, %v", id, err)
	}
	id, err = start(t, orders{}, nil).Wait(t.Context())
	if id != "" || !errors.Is(err, smolvm.ErrDiskBudget) || !strings.HasPrefix(err.Error(), "make it: ") {
		t.Errorf("what fails makes %q, %v; want the worker's own error", id, err)
	}
}

// A worker holds its lock, and goes on, when the one that waits for it has given up.
func TestGivenUp(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	fifo, wrote, lockPath := filepath.Join(dir, "fifo"), filepath.Join(dir, "wrote"), filepath.Join(dir, "lock")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(lockPath)
	if err == nil {
		err = flock.TryLock(lock)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := start(t, orders{Make: "this", Await: fifo, Wrote: wrote}, lock)
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v, want the cancellation", err)
	}
	again, err := os.Open(lockPath)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Close() }()
	if flock.TryLock(again) == nil {
		t.Error("the worker does not hold its lock")
	}
	if err := os.WriteFile(fifo, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := flock.Lock(t.Context(), again); err != nil { // it has ended
		t.Fatal(err)
	}
	if _, err := os.Stat(wrote); err != nil {
		t.Errorf("the worker has not gone on: %v", err)
	}
}

func TestServeRefusesOrders(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "null", "{}", `{"id":"vm"}`, `{"task":3}`, `{"task":{"make":1}}`} {
		err := Serve(t.Context(), strings.NewReader(text), &orders{}, func(context.Context) (string, error) {
			t.Errorf("%q is worked on", text)
			return "", nil
		})
		if err == nil || !strings.Contains(err.Error(), "orders") {
			t.Errorf("orders %q: %v", text, err)
		}
	}
}

// A program that is no worker is not waited for without end, nor taken for one that has
// succeeded; a worker that has begun has all the time it needs.
func TestPrograms(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		script string // with its reports on descriptor 3
		limit  time.Duration
		id     string
		text   string // in the error
		hinted bool
	}{
		"says nothing":          {script: "exec sleep 1000", limit: 50 * time.Millisecond, text: "no answer within 50ms", hinted: true},
		"ends without words":    {script: "exit 0", text: "without a report", hinted: true},
		"fails":                 {script: "exit 3", text: "exit status 3"},
		"talks of other things": {script: "echo hello >&3", text: "without a report", hinted: true},
		"talks, and goes on":    {script: "echo hello >&3; exec sleep 1000", limit: 2 * time.Second, text: "signal: killed"},
		"reports":               {script: `echo '{"id":"x"}' >&3`, id: "x"},
		"has begun, and ends":   {script: `echo '{"started":true}' >&3; echo '{"id":"x"}' >&3`, id: "x"},
		"has begun, and fails":  {script: `echo '{"started":true}' >&3; echo '{"error":{"message":"no luck"}}' >&3; exit 1`, text: "no luck"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, err := Start(t.Context(), Options{
				Program: []string{"/bin/sh", "-c", test.script}, Orders: orders{},
				LogPath: filepath.Join(t.TempDir(), "log"), Hint: "install it", limit: test.limit,
			})
			if err != nil {
				t.Fatal(err)
			}
			id, err := w.Wait(t.Context())
			if w.cmd.ProcessState == nil {
				t.Error("the process is left behind")
			}
			if test.text == "" && err == nil && id == test.id {
				return
			}
			if err == nil || test.text == "" || !strings.Contains(err.Error(), test.text) {
				t.Errorf("it has made %q, %v; want id %q, or an error with %q", id, err, test.id, test.text)
			}
			if hinted := smolvm.HintOf(err) != ""; hinted != test.hinted {
				t.Errorf("the hint of %v is %q", err, smolvm.HintOf(err))
			}
		})
	}
}

func TestNothingToStart(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "log")
	for name, opts := range map[string]Options{
		"no program":        {Program: []string{"/no/such/program"}, Orders: orders{}, LogPath: log},
		"no place for logs": {Program: []string{"true"}, Orders: orders{}, LogPath: "/no/such/directory/log"},
		"no JSON":           {Program: []string{"true"}, Orders: make(chan int), LogPath: log},
	} {
		if _, err := Start(t.Context(), opts); err == nil {
			t.Errorf("%s: a worker is started", name)
		}
	}
}
