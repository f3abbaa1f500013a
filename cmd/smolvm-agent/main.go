// Smolvm-agent runs inside smolvm's guests, as the first process of the initramfs.
package main

import (
	"os"

	"github.com/smolvm/smolvm/internal/agent/guest"
)

// version is set by the build.
var version = "dev"

func main() { os.Exit(guest.Main(version, os.Args)) }
