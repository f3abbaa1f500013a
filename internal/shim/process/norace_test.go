//go:build !race

package process

const raceDetector = false // see race_test.go
