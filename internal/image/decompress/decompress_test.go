package decompress_test

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/smolvm/smolvm/internal/image/decompress"
)

const text = "packed content\n"

// all are the formats in which something may be packed.
func all() []decompress.Format {
	return []decompress.Format{decompress.Gzip, decompress.Bzip2, decompress.Xz, decompress.Zstd}
}

// pack returns the text, packed in one of the formats.
func pack(t testing.TB, format decompress.Format) []byte {
	t.Helper()
	var packed bytes.Buffer
	var w io.WriteCloser
	var err error
	switch format {
	case decompress.Plain:
		return []byte(text)
	case decompress.Gzip:
		w = gzip.NewWriter(&packed)
	case decompress.Zstd:
		w, err = zstd.NewWriter(&packed)
	case decompress.Bzip2: // there are no writers of these two: they were made by bzip2 and xz
		return decode(t, "QlpoOTFBWSZTWUxEEJAAAAZRgAAQQAAuCcQAIAAiAaNNCAaaaEEBpw0p5N4u5IpwoSCYiCEg")
	case decompress.Xz:
		return decode(t, "/Td6WFoAAATm1rRGAgAhARYAAAB0L+WjAQAOcGFja2VkIGNvbnRlbnQKAAC5a+8TzDxtFwABJw/fGvxqH7bzfQEAAAAABFla")
	}
	if err == nil {
		_, err = io.WriteString(w, text)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return packed.Bytes()
}

func decode(t testing.TB, encoded string) []byte {
	t.Helper()
	content, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// skippable is a frame of zstd's format that holds nothing.
const skippable = "\x5f\x2a\x4d\x18\x03\x00\x00\x00abc"

func TestDetect(t *testing.T) {
	t.Parallel()
	gzipped, zstded := pack(t, decompress.Gzip), pack(t, decompress.Zstd)
	for what, test := range map[string]struct {
		packed  []byte
		formats []decompress.Format
		want    string
	}{
		"not packed":          {pack(t, decompress.Plain), all(), text},
		"empty":               {nil, all(), ""},
		"one byte":            {[]byte{0x1f}, all(), "\x1f"},
		"gzip":                {gzipped, all(), text},
		"bzip2":               {pack(t, decompress.Bzip2), all(), text},
		"xz":                  {pack(t, decompress.Xz), all(), text},
		"zstd":                {zstded, all(), text},
		"two of gzip":         {append(bytes.Clone(gzipped), gzipped...), all(), text + text},
		"zstd after skipping": {append([]byte(skippable), zstded...), all(), text},
		"not asked for":       {gzipped, []decompress.Format{decompress.Zstd}, string(gzipped)},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			// A stream may come byte by byte.
			r, err := decompress.Detect(bufio.NewReader(iotest.OneByteReader(bytes.NewReader(test.packed))), test.formats...)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if err := errors.Join(err, r.Close()); err != nil || string(got) != test.want {
				t.Errorf("it unpacks to %q (%v), want %q", got, err, test.want)
			}
		})
	}
}

func TestDamaged(t *testing.T) {
	t.Parallel()
	for _, format := range all() {
		packed := pack(t, format)
		for what, damaged := range map[string][]byte{
			"cut short":      packed[:len(packed)-5],
			"nothing inside": packed[:4],
			"not packed":     []byte(text),
		} {
			r, err := decompress.NewReader(bytes.NewReader(damaged), format)
			if err == nil {
				_, err = io.ReadAll(r)
				_ = r.Close()
			}
			if err == nil {
				t.Errorf("%s, %s: it was unpacked", format, what)
			}
		}
	}
}

// What can't be read fails, and does not count as a short stream.
func TestReadError(t *testing.T) {
	t.Parallel()
	broken := errors.New("the disk is gone")
	if _, err := decompress.Detect(bufio.NewReader(iotest.ErrReader(broken)), all()...); !errors.Is(err, broken) {
		t.Errorf("the error is %v", err)
	}
}

// A stream that asks for a larger window than there may be is refused before it has one.
func TestWindow(t *testing.T) {
	t.Parallel()
	for format, packed := range map[decompress.Format][]byte{
		// The header of a frame with a window of 2 GiB, and of a block with 1 byte.
		decompress.Zstd: []byte("\x28\xb5\x2f\xfd\x00\xa8\x09\x00\x00x"),
		decompress.Xz:   decode(t, "/Td6WFoAAATm1rRGAgAhASQAAABeH8f5AQAOcGFja2VkIGNvbnRlbnQKAAC5a+8TzDxtFwABJw/fGvxqH7bzfQEAAAAABFla"),
	} {
		r, err := decompress.NewReader(bytes.NewReader(packed), format)
		if err == nil {
			_, err = io.ReadAll(r)
			_ = r.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "window") && !strings.Contains(err.Error(), "dictionary") && !strings.Contains(err.Error(), "memory") {
			t.Errorf("%s: the error is %v", format, err)
		}
	}
}

func TestUnknownFormat(t *testing.T) {
	t.Parallel()
	if _, err := decompress.NewReader(strings.NewReader(text), "lzma"); err == nil || !strings.Contains(err.Error(), "lzma") {
		t.Errorf("the error is %v", err)
	}
}

// Whatever a stream is, unpacking it ends, and never panics.
func FuzzDetect(f *testing.F) {
	for _, format := range append(all(), decompress.Plain) {
		f.Add(pack(f, format))
	}
	f.Add([]byte(skippable))
	f.Fuzz(func(t *testing.T, packed []byte) {
		r, err := decompress.Detect(bufio.NewReader(bytes.NewReader(packed)), all()...)
		if err != nil {
			return
		}
		got, err := io.ReadAll(io.LimitReader(r, 1<<20))
		if err == nil && decompress.FormatOf(packed) == decompress.Plain && !bytes.Equal(got, packed[:min(len(packed), 1<<20)]) {
			t.Errorf("what is not packed reads as %d bytes of %d", len(got), len(packed))
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
}
