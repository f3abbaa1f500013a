//go:build !race

package shim

const raceDetector = false // see race_test.go
