package wire

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestRoundTrip(t *testing.T) {
	sent := Hello{
		Hostname:       "web",
		MachineID:      strings.Repeat("a", 32),
		HostKey:        []byte("key"),
		AuthorizedKeys: [][]byte{[]byte("friend")},
		Time:           time.Unix(1, 2).UTC(),
		Seed:           []byte{0, 1, 255},
		Env:            map[string]string{"A": "ä"},
		Network:        &Network{MAC: "02:00:00:00:00:01", Address: netip.MustParsePrefix("10.0.2.15/24"), Gateway: netip.MustParseAddr("10.0.2.2")},
	}
	var stream bytes.Buffer
	// What an earlier session has left does no harm, nor does what looks like a
	// beginning; what comes after the message is left alone.
	stream.WriteString("left over SMOL SMOLVSMOL\n")
	if err := Write(&stream, sent); err != nil {
		t.Fatal(err)
	}
	stream.WriteString("next")
	var got Hello
	if err := Read(&stream, &got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, sent) {
		t.Errorf("got %+v, want %+v", got, sent)
	}
	if stream.String() != "next" {
		t.Errorf("after the message there is %q", stream.String())
	}
}

func TestReadErrors(t *testing.T) {
	for name, test := range map[string]struct {
		stream string
		is     error
		text   string
	}{
		"nothing":     {"", io.EOF, ""},
		"no message":  {"hello", io.EOF, ""},
		"cut header":  {"SMOLVM 1", io.ErrUnexpectedEOF, ""},
		"cut body":    {"SMOLVM 10\n{}", io.ErrUnexpectedEOF, ""},
		"no length":   {"SMOLVM \n{}", nil, "bad length"},
		"not digits":  {"SMOLVM 1x\n{}", nil, "bad length"},
		"too long":    {"SMOLVM 99999999999\n{}", nil, "bad length"},
		"not JSON":    {"SMOLVM 3\n{{{", nil, "decode"},
		"wrong shape": {"SMOLVM 2\n[]", nil, "decode"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Read(strings.NewReader(test.stream), &Control{})
			if err == nil || test.is != nil && !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("error is %v", err)
			}
		})
	}
	if err := Write(io.Discard, strings.Repeat("x", MaxMessage)); err == nil {
		t.Error("a message that is too long is written")
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("SMOLVM 2\n{}"))
	f.Add([]byte("SMOLVM 99999999999999999999\n"))
	f.Fuzz(func(_ *testing.T, stream []byte) {
		_ = Read(bytes.NewReader(stream), &Hello{})
	})
}

func TestSignals(t *testing.T) {
	for _, name := range []string{"HUP", "INT", "KILL", "TERM", "WINCH"} {
		if got := SignalName(SignalNumber(name)); got != name {
			t.Errorf("the name of signal %s is %q", name, got)
		}
	}
	if SignalNumber("NOSUCH") != 0 || SignalName(99) != "" {
		t.Error("there are signals that there are not")
	}
}
