// Command sayargs prints its user, its directory, a variable and its arguments: the only program
// of an image that has nothing else.
package main

import (
	"fmt"
	"os"
)

func main() {
	dir, err := os.Getwd()
	if err != nil {
		dir = err.Error()
	}
	_, _ = fmt.Fprintf(os.Stdout, "%d:%d %s %q %q\n", os.Getuid(), os.Getgid(), dir, os.Getenv("GREETING"), os.Args)
}
