package cpio

import (
	"bytes"
	"errors"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// read is a reader of the format, written from its description and not from Writer.
func read(t *testing.T, archive []byte) map[string]entry {
	t.Helper()
	entries := map[string]entry{}
	at := 0
	field := func(n int) int {
		v, err := strconv.ParseUint(string(archive[at+6+8*n:at+14+8*n]), 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		return int(v)
	}
	for {
		if string(archive[at:at+6]) != "070701" {
			t.Fatalf("no header at %d: %q", at, archive[at:at+6])
		}
		if uid, gid := field(2), field(3); uid != 0 || gid != 0 {
			t.Errorf("owner is %d:%d", uid, gid)
		}
		mode, size, nameSize := field(1), field(6), field(11)
		name := string(archive[at+110 : at+110+nameSize-1])
		content := (at + 110 + nameSize + 3) / 4 * 4
		entries[name] = entry{
			name: name, mode: uint32(mode), major: uint32(field(9)), minor: uint32(field(10)),
			content: archive[content : content+size],
		}
		at = (content + size + 3) / 4 * 4
		if name == "TRAILER!!!" {
			if at != len(archive) {
				t.Errorf("%d bytes after the end", len(archive)-at)
			}
			return entries
		}
	}
}

func archive(t *testing.T) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := NewWriter(&buf)
	w.Dir("dev", 0o755)
	w.CharDevice("dev/console", 0o600, 5, 1)
	w.File("init", 0o755, []byte("#!/bin/sh\n"))
	w.File("empty", 0o600, nil)
	for n := range 5 { // each remainder of the padding
		w.File("n"+strings.Repeat("x", n), 0o644, bytes.Repeat([]byte("y"), n))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestWriter(t *testing.T) {
	entries := read(t, archive(t))
	if len(entries) != 10 {
		t.Errorf("%d entries", len(entries))
	}
	for name, want := range map[string]entry{
		"dev":         {mode: 0o040755},
		"dev/console": {mode: 0o020600, major: 5, minor: 1},
		"init":        {mode: 0o100755, content: []byte("#!/bin/sh\n")},
		"empty":       {mode: 0o100600},
		"nxxx":        {mode: 0o100644, content: []byte("yyy")},
	} {
		got := entries[name]
		if got.mode != want.mode || got.major != want.major || got.minor != want.minor || !bytes.Equal(got.content, want.content) {
			t.Errorf("%s is %+v, want %+v", name, got, want)
		}
	}
}

// A program that is not ours must understand it too.
func TestByCpio(t *testing.T) {
	program, err := exec.LookPath("cpio")
	args := []string{"-t", "--quiet"}
	if err != nil {
		if program, err = exec.LookPath("busybox"); err != nil {
			t.Skip("neither cpio nor busybox is installed")
		}
		args = []string{"cpio", "-t"}
	}
	cmd := exec.Command(program, args...)
	cmd.Stdin = bytes.NewReader(archive(t))
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", filepath.Base(program), err)
	}
	if want := "dev\ndev/console\ninit\nempty\nn\nnx\nnxx\nnxxx\nnxxxx\n"; string(out) != want {
		t.Errorf("lists %q, want %q", out, want)
	}
}

type full struct{ room int }

var errFull = errors.New("full")

func (f *full) Write(b []byte) (int, error) {
	if f.room -= len(b); f.room < 0 {
		return 0, errFull
	}
	return len(b), nil
}

func TestWriterKeepsError(t *testing.T) {
	w := NewWriter(&full{room: 200})
	w.Dir("a", 0o755)
	w.File("b", 0o644, make([]byte, 1000))
	w.Dir("c", 0o755)
	if err := w.Close(); !errors.Is(err, errFull) {
		t.Errorf("Close returns %v", err)
	}
}
