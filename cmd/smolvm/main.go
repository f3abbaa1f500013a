// Command smolvm runs disposable VMs; see package cli.
package main

import (
	"context"
	"os"

	"github.com/smolvm/smolvm/internal/cli"
)

var version string // set by the linker

func main() {
	program := cli.Program{
		Stdin:   os.Stdin,
		Stdout:  os.Stdout,
		Stderr:  os.Stderr,
		Version: version,
	}
	os.Exit(program.Run(context.Background(), os.Args[1:]))
}
