// Package imagebuild does what a plan of package dockerfile says: it makes the layers of an image,
// each by a copy of files, which is done on the host without a file of the image ever being one
// of the host, or by a command that runs in a workspace, which is a VM. Layers are found again by
// keys: of the layers below, the instruction with its variables expanded, and the content of what
// it copies, but of no times.
package imagebuild

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
	"github.com/smolvm/smolvm/internal/image/ocistore"
)

// Image is an image that files and stages come from.
type Image struct {
	// Config is the document of its configuration.
	Config []byte
	// Layers are its layers, the lowest first.
	Layers []ocistore.Layer
}

// Images finds images by the names that Dockerfiles have for them, and fetches what is missing.
type Images interface {
	Find(ctx context.Context, name string) (Image, error)
}

// Store keeps layers, and which of them are the results of which keys.
type Store interface {
	AddLayer(ctx context.Context, r io.Reader) (ocistore.Layer, error)
	OpenLayer(layer ocistore.Layer) (io.ReadCloser, error)
	// Cached returns what a key has led to; ok is false if nothing, or if it is gone.
	Cached(key string) (result ocistore.CachedLayer, ok bool, err error)
	SetCached(ctx context.Context, key string, result ocistore.CachedLayer) error
}

// Workspaces are where commands run.
type Workspaces interface {
	// Open opens a workspace whose root file system has what these layers make.
	Open(ctx context.Context, layers []ocistore.Layer) (Workspace, error)
}

// Workspace is a VM in which commands run one after the other.
type Workspace interface {
	// Run runs a command. What it could not start has ended with status 125 to 127.
	Run(ctx context.Context, command Command) (smolvm.ExitStatus, error)
	// Layer writes what has changed since the last layer, as the archive of one.
	Layer(ctx context.Context, w io.Writer) error
	// Put unpacks the archive of a layer in a directory. It is part of the next layer.
	Put(ctx context.Context, path string, archive io.Reader) error
	// PutArea unpacks an archive beside the root file system, to be mounted, Area archives
	// what is there, and DropArea removes it.
	PutArea(ctx context.Context, name string, inMemory bool, archive io.Reader) error
	Area(ctx context.Context, name string, w io.Writer) error
	DropArea(ctx context.Context, name string) error
	Close(ctx context.Context) error
}

// Command is a command that runs in a workspace.
type Command struct {
	// Args, Env and User are as in [smolvm.Command]. Dir is an absolute path.
	Args, Env      []string
	Dir, User      string
	Stdout, Stderr io.Writer
	NoNetwork      bool
	Mounts         []AreaMount
}

// AreaMount is what is mounted while a command runs.
type AreaMount struct {
	// Area is what is mounted. Empty: an empty file system in memory.
	Area string
	// Source is a path in the area. Empty: all of it.
	Source   string
	Target   string
	ReadOnly bool
	// Size bounds a file system in memory, in bytes. Zero: as large as the guest has it.
	Size int64
}

// Caches keeps the content of cache mounts, as archives.
type Caches interface {
	// OpenCache opens what a cache has; it is nil if there is none.
	OpenCache(id string) (io.ReadCloser, error)
	// SetCache replaces what a cache has by what write writes.
	SetCache(id string, write func(w io.Writer) error) error
	// LockCache keeps others from a cache.
	LockCache(ctx context.Context, id string) (unlock func(), err error)
}

// Options are the options of [Build].
type Options struct {
	// Name is what errors call the Dockerfile.
	Name string
	// Context is where files are copied from.
	Context files.Tree
	// Ignored reports whether a file was left out of the context, for errors; it may be nil.
	Ignored func(name string) bool

	Images     Images
	Store      Store
	Workspaces Workspaces
	Caches     Caches
	// Secrets returns the value of a secret; ok is false if there is none.
	Secrets func(id string) (value []byte, ok bool, err error)

	// NoCache has everything be made anew.
	NoCache bool
	// Epoch is the time of all that is made, and the latest of all that is copied. Nil: the
	// times that they have.
	Epoch *time.Time
	// Arch is the architecture of guests, as Go names it.
	Arch string
	// TempDir is where content is while it is copied.
	TempDir string
	// Progress is told how the build goes on; it may be nil. Its steps are counted from the
	// one after Shown.
	Progress func(smolvm.BuildEvent)
	Shown    int
}

// Result is an image that was built.
type Result struct {
	// Config is its configuration, without what it says of the layers.
	Config []byte
	Layers []ocistore.Layer
	// Cached reports that nothing was made anew.
	Cached bool
}

// emptyTime is the time of what is made without a time of its own, if there is no epoch. It is the
// same for every build, and late enough for archives of zip, which know no time before 1980.
var emptyTime = time.Date(1980, 1, 2, 0, 0, 0, 0, time.UTC)

// builder builds.
type builder struct {
	opts   Options
	stages map[*dockerfile.Stage]*stage
	// trees are those that files are copied from, by the chain of their layers.
	trees  map[string]files.Nodes
	shown  int // steps that were shown
	made   int // layers that were not in the cache
	single bool
}

// Build builds the target of a plan, and what it needs. The caller holds the store. Errors of a
// step are of type [*dockerfile.Error].
func Build(ctx context.Context, plan *dockerfile.Plan, opts Options) (_ Result, err error) {
	if opts.Progress == nil {
		opts.Progress = func(smolvm.BuildEvent) {}
	}
	b := &builder{opts: opts, stages: map[*dockerfile.Stage]*stage{}, trees: map[string]files.Nodes{}, shown: opts.Shown, single: len(plan.Stages) == 1}
	defer func() {
		for _, tree := range b.trees {
			err = errors.Join(err, tree.Spool.Close())
		}
	}()
	for _, planned := range plan.Stages {
		s := &stage{builder: b, plan: planned}
		b.stages[planned] = s
		if err := s.build(ctx); err != nil {
			return Result{}, err
		}
	}
	target := b.stages[plan.Target()]
	config, err := target.config()
	if err != nil {
		return Result{}, err
	}
	return Result{Config: config, Layers: target.layers, Cached: b.made == 0}, nil
}

// errorAt returns an error with the line of the Dockerfile that it belongs to.
func (b *builder) errorAt(line int, err error) error {
	var at *dockerfile.Error
	if err == nil || errors.As(err, &at) {
		return err
	}
	return &dockerfile.Error{File: b.opts.Name, Line: line, Err: err}
}

// now returns the time that something is made at.
func (b *builder) now() time.Time {
	if b.opts.Epoch != nil {
		return *b.opts.Epoch
	}
	return time.Now().UTC()
}

// made returns the time of a file that has none of its own.
func (b *builder) fileTime() time.Time {
	if b.opts.Epoch != nil {
		return *b.opts.Epoch
	}
	return emptyTime
}

// limitTime returns the time of a file that is copied: in whole seconds, as archives have it.
func (b *builder) limitTime(at time.Time) time.Time {
	at = at.Truncate(time.Second)
	if b.opts.Epoch != nil && at.After(*b.opts.Epoch) {
		return *b.opts.Epoch
	}
	return at
}

// show shows that a step begins. What it returns shows how it goes on.
func (b *builder) show(name string) *shown {
	b.shown++
	s := &shown{progress: b.opts.Progress, event: smolvm.BuildEvent{Step: b.shown, Name: name}, began: time.Now()}
	s.progress(s.event)
	return s
}

// shown is a step that is shown.
type shown struct {
	progress func(smolvm.BuildEvent)
	event    smolvm.BuildEvent
	began    time.Time
}

// Write shows what a command says.
func (s *shown) Write(p []byte) (int, error) {
	event := s.event
	event.Output = p
	s.progress(event)
	return len(p), nil
}

// done shows that the step has ended.
func (s *shown) done(cached bool, err error) {
	event := s.event
	event.Done, event.Cached, event.Err = true, cached, err
	event.Duration = time.Since(s.began)
	s.progress(event)
}

// marshal returns a configuration as a document.
func marshal(config dockerfile.Config) ([]byte, error) {
	text, err := json.Marshal(config)
	if err != nil {
		return nil, fmt.Errorf("write configuration of image: %w", err)
	}
	return text, nil
}
