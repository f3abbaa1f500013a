// Package dockerfile reads Dockerfiles: it makes of one a plan, which says for each stage that is
// needed what its image is based on, what is run and copied, with all variables expanded, and
// what the configuration of the image is then. The syntax is that of BuildKit's own parser, and
// so are the rules. What is not supported is refused here, by its name and line, so before
// anything runs.
//
// It does no I/O: what the images say that stages are based on, it asks of who calls it.
// Dockerfiles are hostile: the length of what variables make is bounded.
package dockerfile

import (
	"context"
	"fmt"
	"strings"

	spec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/smolvm/smolvm"
)

// Config is the configuration of an image, as docker has it.
type Config = spec.DockerOCIImage

// Options are the options of [New].
type Options struct {
	// Name is what errors call the Dockerfile: its path as the user wrote it.
	Name string
	// Target is the stage that is wanted, by name or number. Empty: the last one.
	Target string
	// Args are the values of --build-arg, by name.
	Args map[string]string
	// Labels are added to the image.
	Labels map[string]string
	// Arch is the architecture of guests, as Go names it. What a Dockerfile says of platforms
	// has to be for it.
	Arch string
	// Base returns the configuration of an image that a stage is based on, by the name that
	// the Dockerfile has for it. It is asked only for stages that are needed.
	Base func(ctx context.Context, name string) (Config, error)
}

// Plan is what a Dockerfile asks for.
type Plan struct {
	// Stages are those that are needed, each behind those that it needs. The last one is the
	// target.
	Stages []*Stage
	// Warnings are what a user should know, and what ends no build.
	Warnings []Warning
}

// Target returns the stage that becomes the image.
func (p *Plan) Target() *Stage { return p.Stages[len(p.Stages)-1] }

// Warning is something of a Dockerfile that does not do what it seems to.
type Warning struct {
	// Line is the line that it is about, counted from 1. Zero: none.
	Line int
	Text string
}

// Stage is one stage of a Dockerfile.
type Stage struct {
	// Name is the stage's name, or `stage-N`, with its number counted from 0, if it has none.
	Name string
	// Line is the line of its FROM.
	Line int
	// Base is what it is based on.
	Base Source
	// Steps are its instructions, in order: first those that its base has for it (ONBUILD).
	Steps []Step
	// Config is the configuration of its image. It has the history of the image that it is
	// based on, and none if that is a stage: who makes the layers adds what there is to add,
	// and times.
	Config Config
}

// Source is where files come from. The zero value is the build's context.
type Source struct {
	// Stage is another stage, which is before this one.
	Stage *Stage
	// Image is the name of an image, as it is in the Dockerfile.
	Image string
	// Scratch reports that there are no files.
	Scratch bool
}

// Step is an instruction.
type Step struct {
	// Line is the instruction's first line, counted from 1. One that an image has for those
	// that are based on it has the line of FROM.
	Line int
	// Text is the instruction for people, with variables expanded, on one line.
	Text string
	// History is what the image's history says of it.
	History string
	// Op is what makes a layer. Nil: the instruction is about the configuration only.
	Op Op
}

// Op is what makes a layer: a [*Run], a [*Copy] or a [*Mkdir].
type Op interface{ op() }

// Run is a command that is run.
type Run struct {
	// Args is the command, with the shell if it needs one.
	Args []string
	// Env are its variables, as NAME=VALUE: the image's, and arguments of the build.
	Env []string
	// Proxy are variables of proxies, which are no part of what the step's result depends on.
	Proxy []string
	// Dir is an absolute path, and User as images have it; empty is root.
	Dir, User string
	// Mounts are what is mounted while it runs.
	Mounts []Mount
	// NoNetwork reports that it has no network.
	NoNetwork bool
}

// MountType is the type of a mount.
type MountType string

// The types of mounts.
const (
	MountBind   MountType = "bind"
	MountCache  MountType = "cache"
	MountTmpfs  MountType = "tmpfs"
	MountSecret MountType = "secret"
)

// Mount is what is mounted while a command runs, and is no part of the image.
type Mount struct {
	Type MountType
	// Target is an absolute path. Empty: there is a variable only.
	Target string
	// From and Path are what is mounted by a bind mount, and what a cache holds at first.
	From Source
	Path string
	// Files are what a bind mount has in it in place of From.
	Files []File
	// ReadOnly reports that nothing can be written. What is written to a bind mount is gone
	// when the command has ended.
	ReadOnly bool
	// ID names a cache or a secret.
	ID string
	// Sharing is who may use a cache at the same time: shared, private or locked.
	Sharing string
	// Size is how large a tmpfs may become, in bytes. Zero: as large as the guest has it.
	Size int64
	// Mode, UID and GID are those of a secret's file, or of a new cache.
	Mode     uint32
	UID, GID uint32
	// Env is the variable that has a secret's value, if it is not empty.
	Env string
	// Required reports that there must be such a secret.
	Required bool
}

// File is a file whose content is in the Dockerfile.
type File struct {
	Name, Content string
	Mode          uint32
}

// Copy is files that are copied.
type Copy struct {
	// From is where the files are.
	From Source
	// Paths are their paths, relative to the root of From; they may have wildcards.
	Paths []string
	// Files are those in the Dockerfile.
	Files []File
	// Dest is an absolute path. If it ends with a slash, it is a directory.
	Dest string
	// Owner is the user, in the form of USER, who owns the copies. Empty: root for files of the
	// context, and for others the owner that they have in From.
	Owner string
	// Mode changes their permissions: an octal number, or as chmod has it. Empty: as they are.
	Mode string
	// Exclude are patterns of what is left out, as in .dockerignore.
	Exclude []string
	// Unpack reports that archives are unpacked.
	Unpack bool
}

// Mkdir is a directory that is made if it is not there, with those above it.
type Mkdir struct {
	Path string
	// Owner is the user, in the form of USER, who owns what is made. Empty: root.
	Owner string
}

func (*Run) op()   {}
func (*Copy) op()  {}
func (*Mkdir) op() {}

// Error is what is wrong with a Dockerfile.
type Error = smolvm.DockerfileError

// refuse returns the error of what is not supported, with the reason or a way around.
func refuse(what, why string) error {
	return fmt.Errorf("%s is %w: %s", what, smolvm.ErrUnsupported, why)
}

// stageName returns the name of a stage that has none.
func stageName(name string, number int) string {
	if name != "" {
		return name
	}
	return fmt.Sprintf("stage-%d", number)
}

// emptyConfig returns the configuration of an image that has nothing.
func emptyConfig(arch string) Config {
	return Config{Image: ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: arch}, RootFS: ocispec.RootFS{Type: "layers"}}}
}

// oneLine makes a text one line, for progress.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
