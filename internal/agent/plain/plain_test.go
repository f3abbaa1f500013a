package plain_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/plain"
	"github.com/smolvm/smolvm/internal/testenv"
)

const patience = 10 * time.Second

// end is one end of an open channel.
type end struct {
	ssh.Channel
	requests <-chan *ssh.Request
}

func open(t testing.TB) (client, server end) {
	t.Helper()
	ours, theirs := testenv.UnixPair(t)
	accepted := make(chan end, 1)
	go func() {
		asked, err := plain.Accept(theirs)
		if err != nil || asked.ChannelType() != "kind" || asked.Identity() != "me" || string(asked.ExtraData()) != "payload" {
			t.Errorf("asked for %+v, %v", asked, err)
			close(accepted)
			return
		}
		channel, requests, err := asked.Accept()
		if err != nil {
			t.Error(err)
		}
		accepted <- end{channel, requests}
	}()
	channel, requests, err := plain.Open(ours, "me", "kind", []byte("payload"))
	if err != nil {
		t.Fatal(err)
	}
	return end{channel, requests}, <-accepted
}

// All that a channel carries arrives: data, standard error and requests, in both directions,
// more of it than the window has.
func TestChannel(t *testing.T) {
	client, server := open(t)
	long := bytes.Repeat([]byte("0123456789abcdef"), 5*plain.Window/16)
	go func() { // an echo, with a copy on standard error
		text, err := io.ReadAll(server)
		if err != nil {
			t.Error(err)
		}
		go func() {
			for request := range server.requests {
				_, _ = server.SendRequest("got "+request.Type, false, request.Payload)
			}
		}()
		copied := make(chan struct{})
		go func() {
			defer close(copied)
			_, _ = server.Stderr().Write(text)
		}()
		_, _ = server.Write(text)
		<-copied
		if ok, err := server.SendRequest("end", true, []byte("payload")); !ok || err != nil {
			t.Errorf("request: %v, %v", ok, err)
		}
		_ = server.Close()
	}()
	if n, err := client.Write(long); n != len(long) || err != nil {
		t.Fatalf("wrote %d bytes: %v", n, err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	errs := make(chan []byte, 1)
	go func() {
		text, _ := io.ReadAll(client.Stderr())
		errs <- text
	}()
	last := make(chan string, 1)
	go func() {
		var name string
		for request := range client.requests {
			name = request.Type + " " + string(request.Payload)
		}
		last <- name
	}()
	out, err := io.ReadAll(client)
	if err != nil || !bytes.Equal(out, long) {
		t.Errorf("read %d bytes of %d: %v", len(out), len(long), err)
	}
	if text := <-errs; !bytes.Equal(text, long) {
		t.Errorf("read %d bytes of standard error, want %d", len(text), len(long))
	}
	if got := <-last; got != "end payload" {
		t.Errorf("the last request is %q", got)
	}
}

// A writer waits for a reader; a close at either end wakes it.
func TestWriterWaits(t *testing.T) {
	for name, end := range map[string]func(client, server end){
		"closed by itself":   func(client, _ end) { _ = client.Close() },
		"closed by the peer": func(_, server end) { _ = server.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			client, server := open(t)
			written := make(chan int, 1)
			go func() {
				n, _ := client.Write(make([]byte, 2*plain.Window))
				written <- n
			}()
			select {
			case n := <-written:
				t.Fatalf("wrote %d bytes to nobody", n)
			case <-time.After(50 * time.Millisecond):
			}
			end(client, server)
			select {
			case n := <-written:
				if n > plain.Window {
					t.Errorf("wrote %d bytes, more than the window has", n)
				}
			case <-time.After(patience):
				t.Fatal("the writer still waits")
			}
		})
	}
}

// A close ends the other end's reads and requests, and aborting does the same without it.
func TestClose(t *testing.T) {
	for name, end := range map[string]func(end){
		"close": func(e end) { _ = e.Close() },
		"abort": func(e end) { e.Channel.(*plain.Channel).Abort() },
	} {
		t.Run(name, func(t *testing.T) {
			client, server := open(t)
			end(client)
			if _, err := server.Read(make([]byte, 1)); err == nil {
				t.Error("the other end can still read")
			}
			if _, open := <-server.requests; open {
				t.Error("the other end still gets requests")
			}
			if _, err := client.Write([]byte("x")); err == nil {
				t.Error("it can still be written to")
			}
		})
	}
}

func TestReject(t *testing.T) {
	ours, theirs := testenv.UnixPair(t)
	go func() {
		asked, err := plain.Accept(theirs)
		if err != nil {
			t.Error(err)
			return
		}
		_ = asked.Reject(ssh.Prohibited, "not "+strings.Repeat("today ", 10_000))
	}()
	_, _, err := plain.Open(ours, "", "kind", nil)
	refused, ok := errors.AsType[*ssh.OpenChannelError](err)
	if !ok || !strings.HasPrefix(refused.Message, "not today") {
		t.Errorf("error %.200v", err)
	}
}

// answers are those of other ends than ours.
func TestOpenElsewhere(t *testing.T) {
	for name, test := range map[string]struct{ answer, want string }{
		"SSH":              {"SSH-2.0-smolvm\r\n", plain.ErrSSH.Error()},
		"a line":           {"This guest has no agent.\r\n", "This guest has no agent."},
		"a long line":      {strings.Repeat("a\x1b", 100_000), "protocol"},
		"a long reject":    {"R\xff\xff\xff\xff", "protocol"},
		"an accept of two": {"A\x00\x00\x00\x02ab", "protocol"},
		"nothing":          {"", "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := testenv.UnixPair(t)
			go func() {
				_, _ = io.WriteString(theirs, test.answer)
				_ = theirs.CloseWrite()
				_, _ = io.Copy(io.Discard, theirs)
			}()
			_, _, err := plain.Open(ours, "", "kind", nil)
			if err == nil || !strings.Contains(err.Error(), test.want) || len(err.Error()) > 1000 || strings.Contains(err.Error(), "\x1b") {
				t.Errorf("error %.300q, want one with %q", err, test.want)
			}
		})
	}
}

// frame is a frame as it is sent.
func frame(kind byte, body string) string {
	return string([]byte{kind, byte(len(body) >> 24), byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}) + body
}

// An end that does not keep to the protocol ends the channel, and gets no more memory than
// the window has.
func TestHostileEnd(t *testing.T) {
	chunk := frame('D', strings.Repeat("x", 32<<10))
	for name, sent := range map[string]string{
		"an unknown frame":   frame('?', ""),
		"a long frame":       "D\x7f\xff\xff\xff",
		"half a frame":       "D\x00\x00\x00\x05ab",
		"too much data":      strings.Repeat(chunk, plain.Window/(32<<10)+1),
		"data after its end": frame('X', "") + frame('E', "x"),
		"too much credit":    frame('C', "\x00\x00\x00\x01"),
		"a short credit":     frame('C', "\x00"),
		"an empty request":   frame('Q', ""),
		"a cut request":      frame('Q', "\x05ab"),
		"a long request":     frame('Q', "\x01a"+strings.Repeat("x", 20<<10)),
		"a second open":      frame('O', "\x00\x04kind"),
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := testenv.UnixPair(t)
			go func() {
				asked := make([]byte, len(frame('O', "\x00\x04kind")))
				_, _ = io.ReadFull(theirs, asked)
				_, _ = io.WriteString(theirs, frame('A', "")+sent)
				_ = theirs.CloseWrite()
				_, _ = io.Copy(io.Discard, theirs)
			}()
			channel, requests, err := plain.Open(ours, "", "kind", nil)
			if err != nil {
				t.Fatal(err)
			}
			timeout := time.After(patience)
			for open := true; open; {
				select {
				case _, open = <-requests:
				case <-timeout:
					t.Fatal("the channel stays open")
				}
			}
			n, err := io.Copy(io.Discard, channel)
			if err == nil || n > plain.Window {
				t.Errorf("read %d bytes, error %v", n, err)
			}
		})
	}
}

func FuzzServer(f *testing.F) {
	f.Add([]byte(frame('O', "\x02me\x04kindpayload") + frame('D', "data") + frame('X', "")))
	f.Add([]byte(frame('O', "\x00\x00") + frame('Q', "\x06signal\x00\x00\x00\x04KILL") + frame('C', "\x00\x00\x00\x00")))
	f.Fuzz(func(t *testing.T, sent []byte) {
		ours, theirs := testenv.UnixPair(t)
		go func() {
			_, _ = ours.Write(sent)
			_ = ours.CloseWrite()
			_, _ = io.Copy(io.Discard, ours)
		}()
		asked, err := plain.Accept(theirs)
		if err != nil {
			return
		}
		channel, requests, err := asked.Accept()
		if err != nil {
			return
		}
		go ssh.DiscardRequests(requests)
		if n, _ := io.Copy(io.Discard, channel); n > int64(len(sent)) {
			t.Errorf("read %d bytes of %d", n, len(sent))
		}
		_ = channel.Close()
	})
}
