package cli_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/smolvm/smolvm"
)

// pushed pushes an image to a registry of its own on loopback, and returns its name. Its
// configuration has all that one can have; its only file holds the text.
func pushed(t *testing.T, text string) string {
	t.Helper()
	return pushedImage(t, "file", []byte(text), v1.Config{
		Entrypoint: []string{"/run"}, Cmd: []string{"it"}, Env: []string{"A_b=1"}, WorkingDir: "/srv", User: "1:2",
		ExposedPorts: map[string]struct{}{"80/tcp": {}}, Volumes: map[string]struct{}{"/data": {}},
		StopSignal: "SIGINT", Labels: map[string]string{"x/Y.z": "1"},
		Healthcheck: &v1.HealthConfig{Test: []string{"CMD-SHELL", "true"}},
	})
}

// pushedProgram pushes an image with one program, /say, which prints its arguments. The label
// makes it another image than others of the same program.
func pushedProgram(t *testing.T, label string, program []byte) string {
	t.Helper()
	return pushedImage(t, "say", program, v1.Config{
		Entrypoint: []string{"/say"}, Cmd: []string{"by itself"}, Env: []string{"GREETING=hello"}, User: "7:8",
		ExposedPorts: map[string]struct{}{"80/tcp": {}}, Labels: map[string]string{"test": label},
	})
}

func pushedImage(t *testing.T, file string, content []byte, config v1.Config) string {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: file, Mode: 0o755, Size: int64(len(content))})
	_, writeErr := w.Write(content)
	if err := errors.Join(err, writeErr, w.Close()); err != nil {
		t.Fatal(err)
	}
	made, err := mutate.AppendLayers(empty.Image, static.NewLayer(archive.Bytes(), types.DockerUncompressedLayer))
	if err == nil {
		made, err = mutate.Config(made, config)
	}
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	ref := strings.TrimPrefix(server.URL, "http://") + "/image:1"
	tag, err := name.NewTag(ref)
	if err == nil {
		err = remote.Write(tag, made, remote.WithContext(t.Context()))
	}
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// removePulled removes the images that were made of OCI images: the store of images is shared
// with other tests.
func removePulled(t *testing.T, h *host) {
	t.Helper()
	var images []smolvm.Image
	if err := json.Unmarshal([]byte(h.output("image", "ls", "--json")), &images); err != nil {
		t.Fatal(err)
	}
	for _, image := range images {
		if image.OCI != nil && len(image.Names) > 0 {
			h.output("image", "rm", image.Names[0])
		}
	}
}
