//go:build race

package process

// raceDetector reports whether the race detector is on, which takes address space and
// memory of its own.
const raceDetector = true
