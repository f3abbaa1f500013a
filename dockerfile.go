package smolvm

import "time"

// BuildEvent is news of a build from a Dockerfile.
type BuildEvent struct {
	// Step is the number of the step that it is about, counted from 1, and Name the step as
	// docker has it: "[build 2/5] RUN make".
	Step int
	Name string
	// Output is what the step's command says; nil if it says nothing.
	Output []byte
	// Done reports that the step has ended: with Err, or if Cached from the cache of builds.
	Done   bool
	Cached bool
	Err    error
	// Duration is how long it took, if it has ended.
	Duration time.Duration
}
