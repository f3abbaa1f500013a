// Package step names the points between the durable changes of an operation, so that
// tests can list them and end the process at each of them.
package step

import (
	"context"
	"os"
	"syscall"
)

// Variables of the environment by which tests follow and end processes, and those that such
// processes start.
const (
	// CrashEnv has the step at which the process kills itself.
	CrashEnv = "SMOLVM_CRASH"
	// TraceEnv has the path of a file that gets a line for each step that is reached.
	TraceEnv = "SMOLVM_STEPS"
)

// Reached is called when an operation has come to the named step.
func Reached(_ context.Context, name string) {
	if path := os.Getenv(TraceEnv); path != "" {
		trace(path, name)
	}
	if os.Getenv(CrashEnv) != name {
		return
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // no step further
}

func trace(path, name string) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	_, _ = file.WriteString(name + "\n") // in one piece: other processes write too
	_ = file.Close()
}
