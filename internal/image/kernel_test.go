package image

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/smolvm/smolvm/internal/image/imagetest"
)

func tinyKernel() []byte { return imagetest.TinyKernel() }

// bzImage puts a packed kernel into a file such as the kernel's build makes: behind
// one sector and setupSectors more, with something on either side.
func bzImage(setupSectors byte, version uint16, payload []byte) []byte {
	const offset = 100
	sectors := int(setupSectors)
	if sectors == 0 {
		sectors = 4
	}
	image := make([]byte, (sectors+1)*sectorSize+offset)
	image[setupSectorsAt] = setupSectors
	copy(image[setupMagicAt:], setupMagic)
	binary.LittleEndian.PutUint16(image[bootVersionAt:], version)
	binary.LittleEndian.PutUint32(image[payloadOffsetAt:], offset)
	binary.LittleEndian.PutUint32(image[payloadLengthAt:], uint32(len(payload)))
	return append(append(image, payload...), "what comes after"...)
}

func pack(t testing.TB, content []byte, open func(io.Writer) (io.WriteCloser, error)) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := open(&buf)
	if err == nil {
		_, err = w.Write(content)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func gzipOf(t testing.TB, content []byte) []byte {
	return pack(t, content, func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil })
}

func gzipped(t testing.TB) []byte { return gzipOf(t, tinyKernel()) }

func zstandard(t testing.TB) []byte {
	return withLength(pack(t, tinyKernel(), func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }))
}

func lz4Legacy(t testing.TB) []byte {
	return withLength(pack(t, tinyKernel(), func(w io.Writer) (io.WriteCloser, error) {
		out := lz4.NewWriter(w)
		return out, out.Apply(lz4.LegacyOption(true))
	}))
}

// withLength adds the trailer that the kernel's build adds to all but gzip.
func withLength(packed []byte) []byte {
	return binary.LittleEndian.AppendUint32(packed, uint32(len(tinyKernel())))
}

func xzTool(t testing.TB, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath("xz"); err != nil {
		t.Skip("xz is not installed")
	}
	cmd := exec.Command("xz", append([]string{"--check=crc32", "--stdout"}, args...)...)
	cmd.Stdin = bytes.NewReader(tinyKernel())
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return withLength(out)
}

func TestUnpackKernel(t *testing.T) {
	tests := map[string]func() []byte{
		"gzip":         func() []byte { return gzipped(t) },
		"lz4, legacy":  func() []byte { return lz4Legacy(t) },
		"zstd":         func() []byte { return zstandard(t) },
		"xz":           func() []byte { return xzTool(t, "--lzma2") },
		"xz, x86 code": func() []byte { return xzTool(t, "--x86", "--lzma2=dict=32MiB") },
	}
	for name, packed := range tests {
		for _, sectors := range []byte{0, 1, 39} {
			t.Run(name, func(t *testing.T) {
				var out bytes.Buffer
				if err := unpackKernel(&out, bzImage(sectors, 0x20f, packed())); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(out.Bytes(), tinyKernel()) {
					t.Error("what comes out is not what went in")
				}
			})
		}
	}
}

func TestUnpackKernelRefuses(t *testing.T) {
	good := bzImage(4, 0x20f, gzipped(t))
	tests := map[string]struct {
		image []byte
		want  string
	}{
		"empty":         {nil, "not a Linux kernel"},
		"text":          {[]byte(strings.Repeat("hello ", 200)), "not a Linux kernel"},
		"header only":   {good[:payloadLengthAt+4], "cut short"},
		"half":          {good[:len(good)-200], "cut short"},
		"old protocol":  {bzImage(4, 0x207, gzipped(t)), "boot protocol 0x207"},
		"unknown":       {bzImage(4, 0x20f, []byte("BZh91AY and more")), "packed in a way that is not known"},
		"not a kernel":  {bzImage(4, 0x20f, gzipOf(t, []byte("no kernel at all"))), "not an ELF kernel"},
		"damaged":       {bzImage(4, 0x20f, append(gzipped(t)[:40], make([]byte, 40)...)), "unpack kernel"},
		"lz4 damaged":   {bzImage(4, 0x20f, append(lz4Legacy(t)[:40], make([]byte, 40)...)), "unpack kernel"},
		"offset beyond": {beyond(good), "cut short"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := unpackKernel(io.Discard, test.image)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
		})
	}
}

// beyond claims that the payload begins where no file has anything.
func beyond(image []byte) []byte {
	image = bytes.Clone(image)
	binary.LittleEndian.PutUint32(image[payloadOffsetAt:], 0xffff_fff0)
	return image
}

func FuzzKernelPayload(f *testing.F) {
	f.Add(bzImage(4, 0x20f, gzipped(f)))
	f.Add(bzImage(0, 0x20f, lz4Legacy(f)))
	f.Add(bzImage(255, 0x207, zstandard(f)))
	f.Add([]byte(setupMagic))
	f.Fuzz(func(t *testing.T, image []byte) {
		payload, err := kernelPayload(image)
		if err == nil && len(payload) > len(image) {
			t.Error("larger than the file")
		}
		if len(payload) < 1<<16 { // larger ones say little, and take long
			_ = unpackKernel(io.Discard, image)
		}
	})
}

func TestStoreKernel(t *testing.T) {
	dir := t.TempDir()
	put := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	store, err := Open(filepath.Join(dir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()

	plain := put("plain", tinyKernel())
	if got, err := store.Kernel(ctx, plain); err != nil || got != plain {
		t.Errorf("ELF: %q, %v", got, err)
	}
	packed := put("packed", bzImage(4, 0x20f, gzipped(t)))
	first, err := store.Kernel(ctx, packed)
	if err != nil {
		t.Fatal(err)
	}
	if content, err := os.ReadFile(first); err != nil || !bytes.Equal(content, tinyKernel()) {
		t.Errorf("unpacked wrongly (%v)", err)
	}
	again, err := store.Kernel(ctx, packed)
	if err != nil || again != first {
		t.Errorf("second time: %q, %v; first %q", again, err, first)
	}
	// Another kernel in the same place is another kernel.
	put("packed", bzImage(1, 0x20f, gzipped(t)))
	if other, err := store.Kernel(ctx, packed); err != nil || other == first {
		t.Errorf("replaced: %q, %v", other, err)
	}

	for name, path := range map[string]string{"text": put("text", []byte("hello")), "directory": dir} {
		if _, err := store.Kernel(ctx, path); !errors.Is(err, errNotKernel) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	if _, err := store.Kernel(ctx, filepath.Join(dir, "no")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: error is %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "images", kernelsDir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
