package imagebuild

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/stream"
)

// historyComment is what BuildKit notes in the history of images, by which tools know the format.
const historyComment = "buildkit.dockerfile.v0"

// stage is a stage that is being built.
type stage struct {
	*builder
	plan   *dockerfile.Stage
	layers []ocistore.Layer
	// history is of the base and of the steps that are done.
	history []ocispec.History
	// inherited is how much of the history is of the image that it is based on.
	inherited int
	// total is how many steps are shown, and count how many of them are done.
	count, total int

	// selected is what the copy that is being done copies, once its content was read.
	selected []selection
	// tree has what the first of the layers make, as many as treeLayers; nil before it is
	// needed.
	tree       *ocilayer.Tree
	treeSpool  *files.Spool
	treeLayers int
	// work is where commands run, with what the first of the layers make, as many as
	// workLayers; nil before the first command.
	work       Workspace
	workLayers int
}

// build does the stage's steps.
func (s *stage) build(ctx context.Context) (err error) {
	defer func() {
		if s.work != nil {
			err = errors.Join(err, s.work.Close(ctx))
		}
		if s.treeSpool != nil {
			err = errors.Join(err, s.treeSpool.Close())
		}
		s.tree, s.work = nil, nil
	}()
	for _, step := range s.plan.Steps {
		if step.Op != nil {
			s.total++
		}
	}
	if s.plan.Base.Image != "" {
		s.total++
	}
	if err := s.begin(ctx); err != nil {
		return s.errorAt(s.plan.Line, err)
	}
	for _, step := range s.plan.Steps {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if step.Op == nil {
			s.note(step.History, nil, true)
			continue
		}
		if err := s.do(ctx, step); err != nil {
			return s.errorAt(step.Line, err)
		}
	}
	return nil
}

// begin takes over what the stage is based on.
func (s *stage) begin(ctx context.Context) error {
	switch base := s.plan.Base; {
	case base.Stage != nil:
		before := s.stages[base.Stage]
		s.layers, s.history, s.inherited = slices.Clone(before.layers), slices.Clone(before.history), before.inherited
	case base.Image != "":
		shown := s.show(s.title("FROM " + base.Image))
		image, err := s.opts.Images.Find(ctx, base.Image)
		shown.done(true, err)
		if err != nil {
			return fmt.Errorf("FROM %s: %w", base.Image, err)
		}
		s.layers, s.history = slices.Clone(image.Layers), slices.Clone(s.plan.Config.History)
		s.inherited = len(s.history)
	}
	return nil
}

// title returns a step for people, as docker numbers it.
func (s *stage) title(text string) string {
	s.count++
	name := s.plan.Name + " "
	if s.single {
		name = ""
	}
	return fmt.Sprintf("[%s%d/%d] %s", name, s.count, s.total, text)
}

// note adds a step to the history.
func (s *stage) note(text string, at *time.Time, empty bool) {
	s.history = append(s.history, ocispec.History{CreatedBy: text, Comment: historyComment, Created: at, EmptyLayer: empty})
}

// do makes the layer of a step, or finds it.
func (s *stage) do(ctx context.Context, step dockerfile.Step) (err error) {
	shown := s.show(s.title(step.Text))
	cached := false
	defer func() { shown.done(cached, err) }()
	s.selected = nil
	makers, err := s.keyMakers(ctx, step.Op)
	if err != nil {
		return err
	}
	// Keys that led to nothing lead to the result from now on.
	var keys []string
	for _, maker := range makers {
		key, err := maker()
		if err != nil {
			return err
		}
		if result, ok := s.lookup(key); ok {
			cached = true
			return s.add(ctx, step, result, keys)
		}
		keys = append(keys, key)
	}
	s.made++
	result, err := s.make(ctx, step.Op, shown)
	if err != nil {
		return err
	}
	return s.add(ctx, step, result, keys)
}

// lookup finds the layer of a key. One whose record can't be read is made anew.
func (s *stage) lookup(key string) (ocistore.CachedLayer, bool) {
	if s.opts.NoCache {
		return ocistore.CachedLayer{}, false
	}
	result, ok, err := s.opts.Store.Cached(key)
	return result, ok && err == nil
}

// add adds what a step has made, and has keys lead to it.
func (s *stage) add(ctx context.Context, step dockerfile.Step, result ocistore.CachedLayer, keys []string) error {
	for _, key := range keys {
		if err := s.opts.Store.SetCached(ctx, key, result); err != nil {
			return err
		}
	}
	at := result.CreatedAt
	if s.opts.Epoch != nil {
		at = *s.opts.Epoch
	}
	s.note(step.History, &at, result.Layer.Digest == "")
	if result.Layer.Digest != "" {
		s.layers = append(s.layers, result.Layer)
	}
	return nil
}

// make makes the layer of a step.
func (s *stage) make(ctx context.Context, op dockerfile.Op, shown io.Writer) (ocistore.CachedLayer, error) {
	switch op := op.(type) {
	case *dockerfile.Run:
		return s.run(ctx, op, shown)
	case *dockerfile.Copy:
		return s.copyFiles(ctx, op)
	case *dockerfile.Mkdir:
		return s.mkdir(ctx, op)
	}
	return ocistore.CachedLayer{}, fmt.Errorf("a step is a %T", op) // never: there are no others
}

// store stores a layer, given what writes its archive. One that has nothing in it is none.
func (s *stage) store(ctx context.Context, write func(ctx context.Context, w io.Writer) error) (ocistore.CachedLayer, error) {
	result := ocistore.CachedLayer{CreatedAt: s.now()}
	err := stream.Feed(ctx, write, func(r io.Reader) error {
		seen := &zeros{r: r}
		layer, err := s.opts.Store.AddLayer(ctx, seen)
		if seen.other {
			result.Layer = layer
		}
		return err
	})
	return result, err
}

// zeros is a reader that finds out whether all that it reads is zeros, as the archive of nothing
// is.
type zeros struct {
	r     io.Reader
	other bool
}

func (z *zeros) Read(p []byte) (int, error) {
	n, err := z.r.Read(p)
	z.other = z.other || slices.ContainsFunc(p[:n], func(b byte) bool { return b != 0 })
	return n, err
}

// config returns the configuration of the stage's image. Its times are those of the layers, as
// docker has it: so an image that is built again from the cache is the same.
func (s *stage) config() ([]byte, error) {
	config := s.plan.Config
	config.History = slices.Clone(s.history)
	own := config.History[s.inherited:]
	last := s.fileTime()
	for _, before := range config.History[:s.inherited] {
		if before.Created != nil {
			last = *before.Created
		}
	}
	// What comes before the first layer has its time.
	if i := slices.IndexFunc(own, func(h ocispec.History) bool { return h.Created != nil }); i >= 0 {
		last = *own[i].Created
	}
	if s.opts.Epoch != nil {
		last = *s.opts.Epoch
	}
	for i := range own {
		if at := own[i].Created; at != nil {
			last = *at
		} else {
			at := last
			own[i].Created = &at
		}
	}
	config.Created = &last
	config.RootFS.DiffIDs = nil
	return marshal(config)
}

// files returns the stage's files, for what is copied into it: the content of large ones is not
// there.
func (s *stage) files(ctx context.Context) (files.Nodes, error) {
	if s.tree == nil {
		spool, err := files.NewSpool(s.opts.TempDir, maxAccounts)
		if err != nil {
			return files.Nodes{}, err
		}
		s.treeSpool, s.tree = spool, ocilayer.NewTree(spool, ocilayer.Limits{})
	}
	for ; s.treeLayers < len(s.layers); s.treeLayers++ {
		if err := s.addTo(ctx, s.tree, s.layers[s.treeLayers]); err != nil {
			return files.Nodes{}, err
		}
	}
	return files.Nodes{Root: s.tree.Root(), Spool: s.treeSpool}, nil
}

// addTo adds a layer to a tree.
func (b *builder) addTo(ctx context.Context, tree *ocilayer.Tree, layer ocistore.Layer) error {
	err := tree.AddLayer(ctx, ocilayer.Layer{DiffID: layer.DiffID, Open: func() (io.ReadCloser, error) { return b.opts.Store.OpenLayer(layer) }}, nil)
	if err != nil {
		return fmt.Errorf("read layer %s: %w", layer.Digest, err)
	}
	return nil
}

// source returns the files that a source has, with their content.
func (b *builder) source(ctx context.Context, from dockerfile.Source) (files.Tree, error) {
	if from == (dockerfile.Source{}) {
		return b.opts.Context, nil
	}
	layers, err := b.layersOf(ctx, from)
	if err != nil {
		return nil, err
	}
	chain := chainOf(layers)
	if tree, ok := b.trees[chain]; ok {
		return tree, nil
	}
	spool, err := files.NewSpool(b.opts.TempDir, 0)
	if err != nil {
		return nil, err
	}
	tree := ocilayer.NewTree(spool, ocilayer.Limits{})
	for _, layer := range layers {
		if err := b.addTo(ctx, tree, layer); err != nil {
			return nil, errors.Join(err, spool.Close())
		}
	}
	nodes := files.Nodes{Root: tree.Root(), Spool: spool}
	b.trees[chain] = nodes
	return nodes, nil
}

// layersOf returns the layers of a source that is not the context.
func (b *builder) layersOf(ctx context.Context, from dockerfile.Source) ([]ocistore.Layer, error) {
	switch {
	case from.Stage != nil:
		return b.stages[from.Stage].layers, nil
	case from.Image != "":
		image, err := b.opts.Images.Find(ctx, from.Image)
		if err != nil {
			return nil, fmt.Errorf("from=%s: %w", from.Image, err)
		}
		return image.Layers, nil
	}
	return nil, nil
}

// Config reads the configuration of an image that a stage is based on.
func Config(document []byte) (dockerfile.Config, error) {
	var config dockerfile.Config
	if err := json.Unmarshal(document, &config); err != nil {
		return config, fmt.Errorf("read configuration of image: %w", err)
	}
	return config, nil
}
