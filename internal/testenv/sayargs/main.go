// Command sayargs prints its user, its directory, a variable and its arguments: the only program
// of an image that has nothing else.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// With the argument "wait" it waits for a signal, and tells on the console which one it got.
func main() {
	if len(os.Args) > 1 && os.Args[1] == "wait" {
		if err := wait(); err != nil {
			panic(err)
		}
		return
	}
	dir, err := os.Getwd()
	if err != nil {
		dir = err.Error()
	}
	_, _ = fmt.Fprintf(os.Stdout, "%d:%d %s %q %q\n", os.Getuid(), os.Getgid(), dir, os.Getenv("GREETING"), os.Args)
}

func wait() error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGUSR1)
	_, _ = fmt.Fprintln(os.Stdout, "waiting")
	text := fmt.Sprintf("got signal: %s\n", <-signals)
	console, err := os.OpenFile("/dev/console", os.O_WRONLY, 0)
	if err == nil {
		_, err = console.WriteString(text)
	}
	return err
}
