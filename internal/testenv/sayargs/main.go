// Command sayargs prints its user and its arguments: the only program of an image that has
// nothing else.
package main

import (
	"fmt"
	"os"
)

func main() { _, _ = fmt.Fprintf(os.Stdout, "%d:%d %q\n", os.Getuid(), os.Getgid(), os.Args) }
