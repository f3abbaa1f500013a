package workspace

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
)

// host is what a workspace has its VM from, with what is done to it.
type host struct {
	did      []string
	startErr error
	layer    func(ctx context.Context, w io.Writer) error
}

func (h *host) Create(_ context.Context, config smolvm.VMConfig, _ smolvm.CreateOptions) (smolvm.VMInfo, error) {
	if !config.Ephemeral || config.Image != "sha256:1" {
		return smolvm.VMInfo{}, errors.New("it is no VM of a workspace")
	}
	h.did = append(h.did, "create")
	return smolvm.VMInfo{ID: "vm"}, nil
}

func (h *host) Start(context.Context, string, smolvm.StartOptions) (smolvm.VMInfo, error) {
	h.did = append(h.did, "start")
	return smolvm.VMInfo{ID: "vm"}, h.startErr
}

func (h *host) Delete(ctx context.Context, id string, _ smolvm.DeleteOptions) error {
	h.did = append(h.did, "delete "+id)
	return ctx.Err()
}

func (h *host) Guest(context.Context, string) (Guest, error) { return h, nil }

func (h *host) Step(_ context.Context, command smolvm.Command, _ wire.StepRequest) (smolvm.ExitStatus, error) {
	h.did = append(h.did, strings.Join(command.Args, " "))
	return smolvm.ExitStatus{Code: 3}, nil
}

func (h *host) Layer(ctx context.Context, w io.Writer, request wire.LayerRequest) error {
	if request.Discard {
		h.did = append(h.did, "discard")
		return nil
	}
	return h.layer(ctx, w)
}

func (h *host) PutLayer(_ context.Context, archive io.Reader, _ wire.PutRequest) error {
	_, err := io.Copy(io.Discard, archive)
	return err
}

func open(t *testing.T, h *host, limits ocilayer.Limits) *Workspace {
	t.Helper()
	w, err := Open(t.Context(), h, smolvm.Image{Digest: "sha256:1"}, Options{Limits: limits})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// A VM that can't be started is removed, although nobody waits any more.
func TestOpenFails(t *testing.T) {
	h := &host{startErr: errors.New("no start")}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, h, smolvm.Image{Digest: "sha256:1"}, Options{}); !errors.Is(err, h.startErr) {
		t.Errorf("got %v", err)
	}
	if want := []string{"create", "start", "delete vm"}; !slices.Equal(h.did, want) {
		t.Errorf("it did %q, want %q", h.did, want)
	}
}

// archive returns one with a file of such a size.
func archive(t *testing.T, size int64) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "a", Size: size}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// What a guest sends is an archive within the limits, or an error; and after an error the
// workspace is of no use.
func TestHostileLayer(t *testing.T) {
	broken := errors.New("broken")
	for name, test := range map[string]struct {
		layer func(ctx context.Context, w io.Writer) error
		want  error
	}{
		"no archive": {func(_ context.Context, w io.Writer) error {
			_, err := w.Write(bytes.Repeat([]byte("x"), 4096))
			return err
		}, tar.ErrHeader},
		"endless": {func(ctx context.Context, w io.Writer) error {
			for ctx.Err() == nil {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return err
				}
			}
			return context.Cause(ctx)
		}, ocilayer.ErrLimit},
		"long file":  {func(_ context.Context, w io.Writer) error { _, err := w.Write(archive(t, 2<<20)); return err }, ocilayer.ErrLimit},
		"cut":        {func(_ context.Context, w io.Writer) error { _, err := w.Write(archive(t, 1000)[:700]); return err }, io.ErrUnexpectedEOF},
		"its error":  {func(context.Context, io.Writer) error { return broken }, broken},
		"after half": {func(_ context.Context, w io.Writer) error { _, _ = w.Write(archive(t, 1000)[:700]); return broken }, broken},
		"silence": {func(ctx context.Context, _ io.Writer) error {
			<-ctx.Done()
			return context.Cause(ctx)
		}, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			h := &host{layer: test.layer}
			w := open(t, h, ocilayer.Limits{Bytes: 1 << 20})
			ctx := t.Context()
			if name == "silence" {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 10*time.Millisecond)
				defer cancel()
			}
			if err := w.Layer(ctx, io.Discard); err != nil { // nothing is read
				t.Fatal(err)
			}
			var out bytes.Buffer
			if err := w.Layer(ctx, &out); !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if _, err := w.Run(t.Context(), Command{Args: []string{"true"}}); !errors.Is(err, test.want) {
				t.Errorf("it can still be used: %v", err)
			}
		})
	}
}

// A layer is passed on byte by byte.
func TestLayerComesWhole(t *testing.T) {
	want := archive(t, 100_000)
	h := &host{layer: func(_ context.Context, w io.Writer) error { _, err := w.Write(want); return err }}
	w := open(t, h, ocilayer.Limits{})
	var got bytes.Buffer
	if err := w.Layer(t.Context(), &got); err != nil || !bytes.Equal(got.Bytes(), want) {
		t.Errorf("got %d bytes of %d, %v", got.Len(), len(want), err)
	}
	if status, err := w.Run(t.Context(), Command{Args: []string{"make", "all"}}); err != nil || status.Code != 3 {
		t.Errorf("got %s, %v", status, err)
	}
	if _, err := w.Run(t.Context(), Command{}); err == nil {
		t.Error("no command is run")
	}
	if err := w.Close(t.Context()); err != nil || !slices.Contains(h.did, "delete vm") {
		t.Errorf("close: %v, did %q", err, h.did)
	}
}
