package distro_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/deb/debtest"
	"github.com/smolvm/smolvm/internal/image/distro"
	"github.com/smolvm/smolvm/internal/image/ocistore"
)

// fakeStore keeps what a builder stores, and machines that obey no command.
type fakeStore struct {
	layers    [][]byte
	images    []string // by name; empty for one of a while
	config    v1.ConfigFile
	forgotten int
	runs      [][]string
	closed    int
	// refuse makes a command that has it fail.
	refuse string
}

func (s *fakeStore) AddLayer(_ context.Context, archive io.Reader) (ocistore.Layer, error) {
	content, err := io.ReadAll(archive)
	if err != nil {
		return ocistore.Layer{}, err
	}
	s.layers = append(s.layers, content)
	return ocistore.Layer{Digest: fmt.Sprint("layer ", len(s.layers))}, nil
}

func (s *fakeStore) AddImage(_ context.Context, name string, config []byte, layers []ocistore.Layer) (smolvm.Image, error) {
	s.images = append(s.images, fmt.Sprint(name, " of ", len(layers)))
	return smolvm.Image{Digest: fmt.Sprint("image ", len(s.images))}, json.Unmarshal(config, &s.config)
}

func (s *fakeStore) Forget(_ context.Context, image smolvm.Image) error {
	if image.Digest != "image 1" {
		return fmt.Errorf("%s is forgotten", image.Digest)
	}
	s.forgotten++
	return nil
}

func (s *fakeStore) Run(_ context.Context, args []string, stdout, _ io.Writer) (smolvm.ExitStatus, error) {
	s.runs = append(s.runs, args)
	if s.refuse != "" && strings.Contains(strings.Join(args, " "), s.refuse) {
		_, err := io.WriteString(stdout, "Setting up base (1.0-1) ...\nit is broken\n")
		return smolvm.ExitStatus{Code: 2}, err
	}
	_, err := io.WriteString(stdout, "Setting up base (1.0-1) ...\nSetting up needed (1.0-1) ...\nSetting up apt (1.0-1) ...\n")
	return smolvm.ExitStatus{}, err
}

func (s *fakeStore) Layer(_ context.Context, w io.Writer) error {
	_, err := io.WriteString(w, "changed")
	return err
}

func (s *fakeStore) Close(context.Context) error {
	s.closed++
	return nil
}

func build(t *testing.T, s *fakeStore, recipe distro.Recipe) (phases []string, err error) {
	t.Helper()
	builder := distro.Builder{
		Dir: filepath.Join(t.TempDir(), "packages"), Release: testRelease(), Store: s,
		Open:     func(context.Context, smolvm.Image) (distro.Machine, error) { return s, nil },
		Progress: func(p smolvm.Progress) { phases = append(phases, p.Phase) },
	}
	unlock, err := builder.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	_, err = builder.Build(t.Context(), "mine", recipe)
	return phases, err
}

func TestBuild(t *testing.T) {
	packages := distribution()
	packages[1].Info = map[string]string{"preinst": "#!/bin/sh\n"}
	newMirror(t, "[trusted=yes]", packages...)
	recipe := distro.Recipe{Packages: []string{"app"}, User: "me", WorkDir: "/home", Command: []string{"sh"}, Setup: []string{"touch /x"}}
	s := &fakeStore{}
	phases, err := build(t, s, recipe)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{" of 1", "mine of 2"}; !slices.Equal(s.images, want) {
		t.Errorf("the images are %q, want %q", s.images, want)
	}
	if len(s.layers) != 2 || !bytes.Contains(s.layers[0], []byte("install ok unpacked")) || string(s.layers[1]) != "changed" {
		t.Errorf("there are %d layers", len(s.layers))
	}
	if s.closed != 1 || s.forgotten != 1 {
		t.Errorf("the machine was closed %d times, and its image forgotten %d times", s.closed, s.forgotten)
	}
	if len(s.runs) != 2 || !slices.Equal(s.runs[0][3:], []string{"configure", testRelease().Arch, "needed"}) || !slices.Equal(s.runs[1], []string{"/bin/sh", "-ec", "touch /x"}) {
		t.Errorf("%q was run", s.runs)
	}
	key, err := recipe.Key(testRelease())
	config := s.config.Config
	if err != nil || config.User != "me" || config.WorkingDir != "/home" || config.Labels[distro.KeyLabel] != key || len(s.config.History) != 2 {
		t.Errorf("the configuration is %+v", s.config)
	}
	if !slices.Contains(phases, "configure packages, 3 of 5") {
		t.Errorf("the progress was %q", phases)
	}
}

func TestBuildSaysWhatIsBroken(t *testing.T) {
	newMirror(t, "[trusted=yes]", distribution()...)
	for refuse, want := range map[string]string{"dpkg --configure": "configure packages", "touch /x": `set up by "touch /x"`} {
		s := &fakeStore{refuse: refuse}
		_, err := build(t, s, distro.Recipe{Setup: []string{"touch /x"}})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "it is broken") {
			t.Errorf("the error is %v, and should have %q", err, want)
		}
		if s.closed != 1 || s.forgotten != 1 || len(s.images) != 1 {
			t.Errorf("%+v is left", s)
		}
	}
}

// A package that is no package leaves no image.
func TestBuildOfBrokenPackage(t *testing.T) {
	packages := distribution()
	packages[3].Entries = append(packages[3].Entries, debtest.File("./../../etc/passwd", ""))
	newMirror(t, "[trusted=yes]", packages...)
	s := &fakeStore{}
	_, err := build(t, s, distro.Recipe{Packages: []string{"app"}})
	if err == nil || !strings.Contains(err.Error(), "app_1.0-1_") || len(s.images) != 0 {
		t.Errorf("the error is %v, and the images are %q", err, s.images)
	}
}

// On a host without apt the error names what serves instead.
func TestBuildElsewhere(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := build(t, &fakeStore{}, distro.Recipe{Instead: "python:3-slim"})
	if !errors.Is(err, distro.ErrNoPackages) || !strings.Contains(hintOf(err), "python:3-slim") {
		t.Errorf("the error is %v, with the hint %q", err, hintOf(err))
	}
}

func TestBuildEndsWithItsContext(t *testing.T) {
	newMirror(t, "[trusted=yes]", distribution()...)
	ctx, cancel := context.WithCancel(t.Context())
	s := &fakeStore{}
	builder := distro.Builder{
		Dir: filepath.Join(t.TempDir(), "packages"), Release: testRelease(), Store: s,
		Open: func(context.Context, smolvm.Image) (distro.Machine, error) { return s, nil },
		Progress: func(p smolvm.Progress) {
			if strings.HasPrefix(p.Phase, "download") {
				cancel()
			}
		},
	}
	if _, err := builder.Build(ctx, "mine", distro.Recipe{}); !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
}
