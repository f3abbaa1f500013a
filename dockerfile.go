package smolvm

import (
	"fmt"
	"io"
	"time"
)

// DockerfileOptions are the options of [Images.BuildDockerfile].
type DockerfileOptions struct {
	// Context is the directory that files are copied from. Nothing leads out of it.
	Context string
	// ContextArchive is a context too, if Context is empty: an archive by tar, which may be
	// packed by gzip, bzip2, xz or zstd, or a Dockerfile alone, with no files. Both empty:
	// there are no files.
	ContextArchive io.Reader
	// Dockerfile is the Dockerfile's path: on the host, or in the archive if that is the
	// context. Empty: "Dockerfile" in the context.
	Dockerfile string
	// DockerfileText is the Dockerfile itself; nil: it is read from its path.
	DockerfileText []byte

	// Tags are names that the image gets, as docker has them: "app" is
	// "docker.io/library/app:latest". None: it has a digest only, and `image prune` removes it.
	Tags []string
	// Export has the image be written too; the zero value does not.
	Export ExportOptions
	// Target is the stage that is built, by name or number. Empty: the last one.
	Target string
	// Args are the values of the Dockerfile's ARGs. SOURCE_DATE_EPOCH is the time of all that
	// is made, in seconds, so that the same files always make the same image.
	Args map[string]string
	// Labels are added to the image.
	Labels map[string]string
	// Secrets are what `RUN --mount=type=secret` has, by id. They get into no image, and
	// nothing is found by them in the cache.
	Secrets map[string][]byte
	// Platform is what the image is for, as in "linux/amd64". Empty: this host's guests; there
	// is no other.
	Platform string
	// NoCache has every step be done again.
	NoCache bool
	// Pull asks registries what the names of base images mean now.
	Pull bool
	// VM says what the VMs are like in which commands run: CPUs, memory, network, policy.
	VM VMConfig
	// Progress is told how the build goes on; it may be nil.
	Progress func(BuildEvent)
}

// BuildEvent is news of a build from a Dockerfile.
type BuildEvent struct {
	// Step is the number of the step that it is about, counted from 1, and Name the step as
	// docker has it: "[build 2/5] RUN make". Zero: it is about the whole, and Warning is set.
	Step int
	Name string
	// Output is what the step's command says; nil if it says nothing.
	Output []byte
	// Warning is what a user should know, and what ends no build.
	Warning string
	// Done reports that the step has ended: with Err, or if Cached from the cache of builds.
	Done   bool
	Cached bool
	Err    error
	// Duration is how long it took, if it has ended.
	Duration time.Duration
}

// DockerfileError is what is wrong with a Dockerfile, or with what one of its lines has done.
type DockerfileError struct {
	// File is the Dockerfile as the user named it, and Line the line, counted from 1; zero: it
	// is about the whole.
	File string
	Line int
	Err  error
}

func (e *DockerfileError) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %v", e.File, e.Err)
	}
	return fmt.Sprintf("%s:%d: %v", e.File, e.Line, e.Err)
}

// Unwrap returns what is wrong there.
func (e *DockerfileError) Unwrap() error { return e.Err }
