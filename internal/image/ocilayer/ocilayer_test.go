package ocilayer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/smolvm/smolvm/internal/image/ext4fs"
	"github.com/smolvm/smolvm/internal/ocitar"
)

// nowhere takes content and keeps none.
type nowhere struct{}

func (nowhere) Add(r io.Reader, _ int64) (ext4fs.Data, error) {
	_, err := io.Copy(io.Discard, r)
	return ext4fs.Data{}, err
}

func (nowhere) Free(ext4fs.Data) error { return nil }

func layerOf(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func unpack(ctx context.Context, open func() (io.ReadCloser, error)) (*ext4fs.Node, error) {
	return Unpack(ctx, []Layer{{Open: open}}, nowhere{}, Limits{Entries: 10_000, Bytes: 1 << 20}, nil)
}

// A layer that can't be read, and one whose reading is called off, end with that error.
func TestUnpackInterrupted(t *testing.T) {
	broken := errors.New("the disk is broken")
	_, err := unpack(t.Context(), func() (io.ReadCloser, error) {
		begin := layerOf(t, tar.Header{Typeflag: tar.TypeDir, Name: "a"})[:512]
		return io.NopCloser(io.MultiReader(bytes.NewReader(begin), iotest.ErrReader(broken))), nil
	})
	if !errors.Is(err, broken) {
		t.Errorf("a layer that can't be read: %v", err)
	}
	if _, err := unpack(t.Context(), func() (io.ReadCloser, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("a layer that can't be opened: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	interrupted := errors.New("interrupted")
	_, err = unpack(ctx, func() (io.ReadCloser, error) {
		cancel(interrupted)
		return io.NopCloser(bytes.NewReader(layerOf(t, tar.Header{Typeflag: tar.TypeDir, Name: "a"}))), nil
	})
	if !errors.Is(err, interrupted) {
		t.Errorf("a layer whose reading is called off: %v", err)
	}
}

// A file of holes may say that it is of any size.
func TestUnpackSparse(t *testing.T) {
	records := map[string]string{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0", "GNU.sparse.size": fmt.Sprint(int64(1) << 60), "GNU.sparse.numblocks": "1"}
	var text strings.Builder
	for name, value := range records {
		line := " " + name + "=" + value + "\n"
		for size := len(line) + 1; ; size++ { // of which its own digits are part
			if whole := fmt.Sprint(size) + line; len(whole) == size {
				text.WriteString(whole)
				break
			}
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	// As an ordinary file first, whose type is then that of records.
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "records", Size: int64(text.Len()), Format: tar.FormatUSTAR}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, text.String()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "sparse"}), w.Close()); err != nil {
		t.Fatal(err)
	}
	layer := b.Bytes()
	layer[156] = 'x'
	copy(layer[148:156], "        ") // as which the checksum counts itself
	sum := 0
	for _, c := range layer[:512] {
		sum += int(c)
	}
	copy(layer[148:156], fmt.Sprintf("%06o\x00 ", sum))
	_, err := unpack(t.Context(), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil })
	if !errors.Is(err, ErrLimit) {
		t.Errorf("a file of 2^60 bytes: %v", err)
	}
}

func TestUnpackProgress(t *testing.T) {
	layer := layerOf(t, tar.Header{Typeflag: tar.TypeDir, Name: "a"})
	var last int64
	_, err := Unpack(t.Context(), []Layer{{Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil }}}, nowhere{}, Limits{},
		func(_ int, bytes int64) { last = bytes })
	var other *DiffIDError
	if !errors.As(err, &other) || !strings.Contains(err.Error(), "layer 1 of 1") || last != int64(len(layer)) {
		t.Errorf("a layer without a digest: %v, after %d bytes of %d", err, last, len(layer))
	}
}

// Whatever a layer is, it is unpacked or refused, and no file is in itself or without an end.
func FuzzUnpack(f *testing.F) {
	for _, headers := range [][]tar.Header{
		{{Typeflag: tar.TypeDir, Name: "a/"}, {Typeflag: tar.TypeReg, Name: "a/.wh..wh..opq"}, {Typeflag: tar.TypeLink, Name: "b", Linkname: "a/c"}},
		{{Typeflag: tar.TypeSymlink, Name: "s", Linkname: "../s/.."}, {Typeflag: tar.TypeReg, Name: "s/x"}, {Typeflag: tar.TypeReg, Name: ".wh.s"}},
		{{Typeflag: tar.TypeReg, Name: "x"}, {Typeflag: tar.TypeLink, Name: "y", Linkname: "/x"}, {Typeflag: tar.TypeDir, Name: "x"}, {Typeflag: tar.TypeFifo, Name: "x/../z"}},
		{{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3, PAXRecords: map[string]string{ocitar.XattrRecord + "security.x": "1"}}},
	} {
		f.Add(layerOf(f, headers...))
	}
	f.Fuzz(func(t *testing.T, layer []byte) {
		to := newTree(nowhere{})
		left := newBudget(Limits{Entries: 10_000, Bytes: 1 << 20})
		_, _ = unpackLayer(t.Context(), to, Layer{Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil }}, &left, func(int64) {})
		if err := sound(to.root, map[*ext4fs.Node]bool{}); err != nil {
			t.Error(err)
		}
	})
}

// sound returns what is wrong with a tree.
func sound(n *ext4fs.Node, above map[*ext4fs.Node]bool) error {
	if above[n] {
		return errors.New("a directory is in itself")
	}
	above[n] = true
	defer delete(above, n)
	for name, child := range n.Children {
		if name == "" || name == "." || name == ".." || len(name) > maxName || strings.ContainsAny(name, "/\x00") {
			return fmt.Errorf("a file has the name %q", name)
		}
		if child.IsDir() != (child.Children != nil) {
			return fmt.Errorf("%q is a directory: %v", name, child.IsDir())
		}
		if err := sound(child, above); err != nil {
			return err
		}
	}
	return nil
}

// What is accepted of a guest is within the limits, and no entry of it is refused later but for
// what is below it.
func FuzzCheck(f *testing.F) {
	f.Add(layerOf(f, tar.Header{Typeflag: tar.TypeDir, Name: "a/"}, tar.Header{Typeflag: tar.TypeReg, Name: "a/.wh..wh..opq"}, tar.Header{Typeflag: tar.TypeReg, Name: "a/b"}))
	f.Add(layerOf(f, tar.Header{Typeflag: tar.TypeSymlink, Name: "s", Linkname: ".."}, tar.Header{Typeflag: tar.TypeLink, Name: "l", Linkname: "s"}))
	f.Add(layerOf(f, tar.Header{Typeflag: tar.TypeBlock, Name: "b", Devmajor: 8, PAXRecords: map[string]string{ocitar.XattrRecord + "security.x": "1"}}))
	f.Add(layerOf(f, tar.Header{Typeflag: tar.TypeReg, Name: strings.Repeat("n", 300)}))
	f.Fuzz(func(t *testing.T, archive []byte) {
		limits := Limits{Entries: 100, Bytes: 1 << 20}
		if Check(t.Context(), bytes.NewReader(archive), limits) != nil {
			return
		}
		to := newTree(nowhere{})
		left := newBudget(limits)
		err := to.apply(t.Context(), tar.NewReader(bytes.NewReader(archive)), &left)
		if errors.Is(err, ErrLimit) {
			t.Errorf("it was accepted: %v", err)
		}
		for r := tar.NewReader(bytes.NewReader(archive)); ; {
			header, err := r.Next()
			if err != nil {
				return
			}
			if err := checkEntry(header); err != nil {
				t.Errorf("it was accepted: %v", err)
			}
		}
	})
}

// An archive that says of itself that it is within the limits, and is not, is refused.
func TestCheckLimits(t *testing.T) {
	files := layerOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "a"}, tar.Header{Typeflag: tar.TypeReg, Name: "b"})
	for name, test := range map[string]struct {
		archive io.Reader
		limits  Limits
		want    error
	}{
		"within":        {bytes.NewReader(files), Limits{Entries: 2, Bytes: 1 << 20}, nil},
		"many entries":  {bytes.NewReader(files), Limits{Entries: 1}, ErrLimit},
		"long":          {bytes.NewReader(files), Limits{Bytes: 1000}, ErrLimit},
		"endless tail":  {io.MultiReader(bytes.NewReader(files), zeros{}), Limits{Bytes: 1 << 20}, ErrLimit},
		"cut":           {bytes.NewReader(files[:700]), Limits{}, io.ErrUnexpectedEOF},
		"not an answer": {strings.NewReader(strings.Repeat("no archive", 100)), Limits{}, tar.ErrHeader},
	} {
		if err := Check(t.Context(), test.archive, test.limits); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
}

// zeros is an endless reader.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
