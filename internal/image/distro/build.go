package distro

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/stream"
)

// KeyLabel is the label of an image that tells by which recipe it was made; see [Recipe.Key].
const KeyLabel = "smolvm.recipe"

// maxOutput is how much of what maintainer scripts say is kept for an error, in bytes.
const maxOutput = 4 << 10

// Store keeps images.
type Store interface {
	// AddLayer stores the archive of a layer, unpacked.
	AddLayer(ctx context.Context, archive io.Reader) (ocistore.Layer, error)
	// AddImage stores an image, and makes it bootable. Without a name it is one that a build
	// needs for a while.
	AddImage(ctx context.Context, name string, config []byte, layers []ocistore.Layer) (smolvm.Image, error)
	// Forget removes an image that has no name.
	Forget(ctx context.Context, image smolvm.Image) error
}

// Machine is a machine that was made of an image.
type Machine interface {
	// Run runs a command as root, without a network.
	Run(ctx context.Context, args []string, stdout, stderr io.Writer) (smolvm.ExitStatus, error)
	// Layer writes what has changed as the archive of a layer.
	Layer(ctx context.Context, w io.Writer) error
	// Close removes the machine, also when ctx is done.
	Close(ctx context.Context) error
}

// Builder builds images of the packages of this host's distribution.
type Builder struct {
	// Dir is where lists and packages are kept for the next time.
	Dir     string
	Release Release
	Store   Store
	// Open makes a machine of an image.
	Open func(ctx context.Context, image smolvm.Image) (Machine, error)
	// Progress is told of each phase; it may be nil.
	Progress func(smolvm.Progress)
}

func (b Builder) say(phase string, done, total int64) {
	if b.Progress != nil {
		b.Progress(smolvm.Progress{Phase: phase, Done: done, Total: total})
	}
}

// LockName is the name of the file in a [Builder]'s directory that is locked while an image is built.
const LockName = "lock"

// Lock waits until no other process builds in the directory. The caller unlocks.
func (b Builder) Lock(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(b.Dir, 0o700); err != nil {
		return nil, err
	}
	if unlock, err = flock.At(ctx, filepath.Join(b.Dir, LockName)); err != nil {
		return nil, fmt.Errorf("wait for another build: %w", err)
	}
	return unlock, nil
}

// Build builds a recipe's image and gives it the name. The lock is held; see [Builder.Lock].
// The error matches [ErrNoPackages] on a host without packages of Debian or Ubuntu.
func (b Builder) Build(ctx context.Context, name string, recipe Recipe) (smolvm.Image, error) {
	if err := recipe.Check(); err != nil {
		return smolvm.Image{}, err
	}
	debs, files, err := b.fetch(ctx, recipe)
	if err != nil {
		return smolvm.Image{}, err
	}
	unpacked, made, err := b.unpack(ctx, debs, files)
	if err != nil {
		return smolvm.Image{}, fmt.Errorf("unpack packages: %w", err)
	}
	bare, err := b.Store.AddImage(ctx, "", []byte("{}"), []ocistore.Layer{unpacked})
	if err != nil {
		return smolvm.Image{}, err
	}
	configured, err := b.configure(ctx, bare, recipe, made)
	if err != nil {
		return smolvm.Image{}, errors.Join(err, b.Store.Forget(context.WithoutCancel(ctx), bare))
	}
	config, err := b.config(recipe, made)
	if err != nil {
		return smolvm.Image{}, err
	}
	image, err := b.Store.AddImage(ctx, name, config, []ocistore.Layer{unpacked, configured})
	return image, errors.Join(err, b.Store.Forget(context.WithoutCancel(ctx), bare))
}

// fetch downloads the packages of a recipe, and returns them with the other files of its image.
func (b Builder) fetch(ctx context.Context, recipe Recipe) ([]string, []File, error) {
	source, err := OpenSource(b.Dir, b.Release)
	if err != nil {
		return nil, nil, instead(err, recipe)
	}
	const lists = "fetch package lists"
	b.say(lists, 0, 0)
	warning, err := source.Update(ctx, func(float64) {})
	if err != nil {
		return nil, nil, err
	}
	if warning != "" {
		b.say("use package lists of an earlier time: "+warning, 0, 0)
	}
	plan, err := source.Plan(ctx, recipe)
	if err != nil {
		return nil, nil, err
	}
	missing, err := source.Missing(ctx, recipe)
	if err != nil {
		return nil, nil, err
	}
	phase := fmt.Sprintf("download packages, %d in all", len(plan))
	b.say(phase, 0, missing)
	debs, err := source.Fetch(ctx, recipe, plan, func(percent float64) {
		b.say(phase, int64(percent*float64(missing)/100), missing)
	})
	if err != nil {
		return nil, nil, err
	}
	sources, err := source.Mirrors(ctx)
	if err != nil {
		return nil, nil, err
	}
	// What can't be cleaned up takes room, and is no reason to have no image.
	_ = source.Clean(ctx)
	return debs, imageFiles(b.Release, sources), nil
}

// instead adds the image to use instead to [ErrNoPackages], and returns other errors as they are.
func instead(err error, recipe Recipe) error {
	if !errors.Is(err, ErrNoPackages) {
		return err
	}
	image := recipe.Instead
	if image == "" {
		image = "debian:stable-slim"
	}
	return &smolvm.Error{Hint: fmt.Sprintf("use an OCI image, such as `smolvm run %s`", image), Err: err}
}

// steps reports progress in tenths, as each report is a line where there is no terminal.
func (b Builder) steps(phase string, total int) func(done int) {
	last := 0
	return func(done int) {
		if tenth := done * 10 / max(total, 1); tenth > last {
			last = tenth
			b.say(fmt.Sprintf("%s, %d of %d", phase, done, total), 0, 0)
		}
	}
}

// unpack stores the layer of packages as they are unpacked.
func (b Builder) unpack(ctx context.Context, debs []string, files []File) (ocistore.Layer, []Unpacked, error) {
	b.say("unpack packages", 0, 0)
	var made []Unpacked
	stored, err := b.store(ctx, func(ctx context.Context, w io.Writer) (err error) {
		made, err = WriteLayer(ctx, w, debs, files, Limits{}, b.steps("unpack packages", len(debs)))
		return err
	})
	return stored, made, err
}

// store stores the layer whose archive write writes.
func (b Builder) store(ctx context.Context, write func(ctx context.Context, w io.Writer) error) (stored ocistore.Layer, err error) {
	err = stream.Feed(ctx, write, func(r io.Reader) (err error) {
		stored, err = b.Store.AddLayer(ctx, r)
		return err
	})
	return stored, err
}

// configure runs the maintainer scripts, and the recipe's lines, in a machine of the unpacked
// image, and stores what they change.
func (b Builder) configure(ctx context.Context, bare smolvm.Image, recipe Recipe, made []Unpacked) (_ ocistore.Layer, err error) {
	b.say("configure packages", 0, 0)
	machine, err := b.Open(ctx, bare)
	if err != nil {
		return ocistore.Layer{}, fmt.Errorf("configure packages: %w", err)
	}
	defer func() { err = errors.Join(err, machine.Close(ctx)) }()
	args := []string{"/bin/sh", "-c", configureScript, "configure", b.Release.Arch}
	for _, p := range made {
		if p.HasPreinst {
			args = append(args, p.Name)
		}
	}
	watch := &output{step: b.steps("configure packages", len(made))}
	if err := b.run(ctx, machine, args, watch); err != nil {
		return ocistore.Layer{}, fmt.Errorf("configure packages: %w", err)
	}
	for i, line := range recipe.Setup {
		b.say(fmt.Sprintf("set up, line %d of %d", i+1, len(recipe.Setup)), 0, 0)
		if err := b.run(ctx, machine, []string{"/bin/sh", "-ec", line}, &output{}); err != nil {
			return ocistore.Layer{}, fmt.Errorf("set up by %.200q: %w", line, err)
		}
	}
	b.say("store what has changed", 0, 0)
	return b.store(ctx, machine.Layer)
}

func (b Builder) run(ctx context.Context, machine Machine, args []string, watch *output) error {
	status, err := machine.Run(ctx, args, watch, watch)
	if err != nil {
		return err
	}
	if !status.Success() {
		return fmt.Errorf("it ended with %s: %s", status, watch.last())
	}
	return nil
}

// config returns what an image says of its program, as the OCI's specification has it.
func (b Builder) config(recipe Recipe, made []Unpacked) ([]byte, error) {
	key, err := recipe.Key(b.Release)
	if err != nil {
		return nil, err
	}
	now := v1.Time{Time: time.Now().UTC().Truncate(time.Second)}
	return json.Marshal(v1.ConfigFile{
		Created: now,
		Config: v1.Config{
			Env: recipe.Environment(), Cmd: recipe.Command, User: recipe.User, WorkingDir: recipe.WorkDir,
			Labels: map[string]string{KeyLabel: key},
		},
		History: []v1.History{
			{Created: now, CreatedBy: fmt.Sprintf("unpack %d packages of %s", len(made), b.Release)},
			{Created: now, CreatedBy: strings.Join(append([]string{"configure them"}, recipe.Setup...), "; ")},
		},
	})
}

// output counts what dpkg has configured, and keeps the end of what was said.
type output struct {
	step  func(done int)
	count int
	line  []byte
	tail  []byte
}

func (o *output) Write(b []byte) (int, error) {
	o.tail = append(o.tail, b...)
	if len(o.tail) > 2*maxOutput {
		o.tail = append([]byte(nil), o.tail[len(o.tail)-maxOutput:]...)
	}
	if o.step == nil {
		return len(b), nil
	}
	for rest := b; len(rest) > 0; {
		line, after, ended := bytes.Cut(rest, []byte("\n"))
		if o.line = append(o.line, line...); len(o.line) > maxOutput {
			o.line = o.line[:maxOutput]
		}
		if ended {
			if bytes.HasPrefix(o.line, []byte("Setting up ")) {
				o.count++
				o.step(o.count)
			}
			o.line = o.line[:0]
		}
		rest = after
	}
	return len(b), nil
}

// last returns the last lines that were said, as one.
func (o *output) last() string {
	lines := strings.FieldsFunc(string(o.tail), func(r rune) bool { return r == '\n' })
	return strings.Join(lines[max(0, len(lines)-4):], "; ")
}
