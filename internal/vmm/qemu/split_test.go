package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// testMemory is the size of the guest's memory in these tests.
const testMemory = 8 * ramPageSize

// stream builds a migration stream.
type stream struct{ bytes.Buffer }

func (s *stream) u8(v byte)    { s.WriteByte(v) }
func (s *stream) u32(v uint32) { s.Write(binary.BigEndian.AppendUint32(nil, v)) }
func (s *stream) u64(v uint64) { s.Write(binary.BigEndian.AppendUint64(nil, v)) }
func (s *stream) name(n string) {
	s.u8(byte(len(n)))
	s.WriteString(n)
}

// header is what comes before the memory's section.
func (s *stream) header() *stream {
	s.u32(streamMagic)
	s.u32(streamVersion)
	s.u8(markConfiguration)
	s.u32(3)
	s.WriteString("q35")
	s.u8(markCommand)
	s.Write([]byte{0, 1, 0, 2, 0xaa, 0xbb})
	return s
}

// start begins the memory's section, with the sizes of two blocks.
func (s *stream) start() *stream {
	s.u8(markSectionStart)
	s.u32(2)
	s.name("ram")
	s.u32(0)
	s.u32(ramVersion)
	s.u64(testMemory + ramPageSize | ramSize)
	s.name(ramID)
	s.u64(testMemory)
	s.name("rom")
	s.u64(ramPageSize)
	return s.end()
}

func (s *stream) section(mark byte) *stream {
	s.u8(mark)
	s.u32(2)
	return s
}

func (s *stream) page(block string, at int, flags uint64, content ...byte) *stream {
	word := uint64(at*ramPageSize) | flags
	if block == "" {
		s.u64(word | ramContinue)
	} else {
		s.u64(word)
		s.name(block)
	}
	s.Write(content)
	return s
}

// end ends a part of a section.
func (s *stream) end() *stream {
	s.u64(ramEnd)
	s.u8(markFooter)
	s.u32(2)
	return s
}

func page(fill byte) []byte { return bytes.Repeat([]byte{fill}, ramPageSize) }

// goodStream has a page that comes twice, one that becomes zeros again, one of another
// block, and devices at its end.
func goodStream() []byte {
	var s stream
	s.header().start()
	s.section(markSectionPart).
		page(ramID, 0, ramPage, page('a')...).
		page("", 1, ramPage, page('b')...).
		page("", 2, ramZero, 0).
		page("", 3, ramZero, 'z').
		page("rom", 0, ramPage, page('r')...).
		page(ramID, 5, ramPage, page('c')...).
		end()
	s.section(markSectionEnd).
		page(ramID, 1, ramPage, page('B')...).
		page("", 5, ramZero, 0).
		end()
	s.WriteString("the devices")
	return s.Bytes()
}

func split(t testing.TB, in []byte) (state, memory []byte, err error) {
	t.Helper()
	file, createErr := os.Create(filepath.Join(t.TempDir(), "memory"))
	if createErr != nil {
		t.Fatal(createErr)
	}
	defer func() { _ = file.Close() }()
	if err := file.Truncate(testMemory); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err = splitStream(bytes.NewReader(in), &out, file)
	memory, readErr := os.ReadFile(file.Name())
	if readErr != nil {
		t.Fatal(readErr)
	}
	return out.Bytes(), memory, err
}

func TestSplitStream(t *testing.T) {
	state, memory, err := split(t, goodStream())
	if err != nil {
		t.Fatal(err)
	}
	want := slices.Concat(page('a'), page('B'), page(0), page('z'), page(0), page(0), page(0), page(0))
	if !bytes.Equal(memory, want) {
		t.Error("the memory is not what the stream says")
	}
	var rest stream
	rest.header().start()
	rest.section(markSectionPart).page("rom", 0, ramPage, page('r')...).end()
	rest.section(markSectionEnd).end()
	rest.WriteString("the devices")
	if !bytes.Equal(state, rest.Bytes()) {
		t.Errorf("what is left of the stream:\n%q\nwant:\n%q", state, rest.Bytes())
	}
	// A stream without memory, as that is, is passed on as it is.
	again, memory, err := split(t, state)
	if err != nil || !bytes.Equal(again, state) || len(bytes.Trim(memory, "\x00")) != 0 {
		t.Errorf("splitting it again changes it: %v", err)
	}
}

// Wherever a stream ends before the devices, that is noticed.
func TestSplitStreamCut(t *testing.T) {
	whole := goodStream()
	for cut := 0; cut < len(whole)-len("the devices"); cut += 1 + cut/64 {
		if _, _, err := split(t, whole[:cut]); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("a stream of %d bytes: %v", cut, err)
		}
	}
}

func TestSplitStreamUnknown(t *testing.T) {
	build := func(f func(*stream)) []byte {
		var s stream
		f(&s)
		return s.Bytes()
	}
	tests := map[string][]byte{
		"another magic":  build(func(s *stream) { s.u32(1); s.u32(streamVersion); s.Write(page(0)) }),
		"another mark":   build(func(s *stream) { s.header().u8(0x55); s.Write(page(0)) }),
		"other section":  build(func(s *stream) { s.header().section(markSectionStart).name("block"); s.Write(page(0)) }),
		"page beyond":    build(func(s *stream) { s.header().start().section(markSectionPart).page(ramID, 8, ramPage, page(1)...) }),
		"zeros beyond":   build(func(s *stream) { s.header().start().section(markSectionPart).page(ramID, 9, ramZero, 0) }),
		"compressed":     build(func(s *stream) { s.header().start().section(markSectionPart).page(ramID, 0, 0x100, page(1)...) }),
		"block too big":  build(func(s *stream) { s.header(); hugeBlock(s, ramID, testMemory*2) }),
		"block too fat":  build(func(s *stream) { s.header(); hugeBlock(s, "rom", 1<<62) }),
		"no footer":      build(func(s *stream) { s.header().start().section(markSectionEnd); s.u64(ramEnd); s.Write(page(0)) }),
		"giant string":   build(func(s *stream) { s.u32(streamMagic); s.u32(streamVersion); s.u8(markConfiguration); s.u32(1 << 31) }),
		"not QEMU's own": []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
	}
	for name, in := range tests {
		t.Run(name, func(t *testing.T) {
			if _, _, err := split(t, in); !errors.Is(err, errStream) {
				t.Errorf("error is %v, want %v", err, errStream)
			}
		})
	}
}

func hugeBlock(s *stream, name string, size uint64) {
	s.section(markSectionStart).name("ram")
	s.u32(0)
	s.u32(ramVersion)
	s.u64(testMemory | ramSize)
	s.name(name)
	s.u64(size)
}

// FuzzSplitStream: whatever comes, the memory keeps its size, and what is passed on is no
// more than what came.
func FuzzSplitStream(f *testing.F) {
	f.Add(goodStream())
	f.Add(goodStream()[:100])
	f.Add([]byte("QEVM\x00\x00\x00\x03\x7e"))
	f.Fuzz(func(t *testing.T, in []byte) {
		state, memory, err := split(t, in)
		if len(memory) != testMemory {
			t.Errorf("the memory has %d bytes", len(memory))
		}
		if err == nil && len(state) > len(in) {
			t.Errorf("%d bytes became %d", len(in), len(state))
		}
	})
}
