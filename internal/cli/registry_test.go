package cli_test

import (
	"encoding/json"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/registrytest"
)

// pushed pushes an image to a registry of its own on loopback, and returns its name. Its
// configuration has all that one can have; its only file holds the text.
func pushed(t *testing.T, text string) string {
	t.Helper()
	return pushedImage(t, "file", text, v1.Config{
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
	return pushedImage(t, "say", string(program), v1.Config{
		Entrypoint: []string{"/say"}, Cmd: []string{"by itself"}, Env: []string{"GREETING=hello"}, User: "7:8",
		ExposedPorts: map[string]struct{}{"80/tcp": {}}, Labels: map[string]string{"test": label},
	})
}

func pushedImage(t *testing.T, file, content string, config v1.Config) string {
	t.Helper()
	ref := registrytest.New(t).Host + "/image:1"
	registrytest.Push(t, ref, map[string]string{file: content}, config)
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
