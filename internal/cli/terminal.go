package cli

import (
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/smolvm/smolvm"
)

// terminal returns the descriptor of a stream that is a terminal.
func terminal(stream any) (fd int, ok bool) {
	if o, ok := stream.(*output); ok {
		stream = o.raw
	}
	file, isFile := stream.(*os.File)
	if !isFile {
		return 0, false
	}
	fd = int(file.Fd())
	return fd, term.IsTerminal(fd)
}

// terminalWidth returns the width of a stream in characters; 0 if it is no terminal.
func terminalWidth(stream any) int {
	fd, ok := terminal(stream)
	if !ok {
		return 0
	}
	width, _, err := term.GetSize(fd)
	if err != nil {
		return 0
	}
	return width
}

// colored reports whether a stream may be coloured; see https://no-color.org.
func colored(stream any) bool {
	_, ok := terminal(stream)
	return ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// interactive reports whether a person sits before both ends of the program.
func (a *app) interactive() bool {
	_, in := terminal(a.Stdin)
	_, out := terminal(a.Stdout)
	return in && out
}

// background reports whether this process is a background job of the terminal fd.
// Reading from it would stop us then.
func background(fd int) bool {
	group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err == nil && group != unix.Getpgrp()
}

// attachTTY describes our terminal to a command, and hands over its keyboard: all
// keys go to the command, Ctrl-C too. The caller must call restore, which gives the
// terminal back as it was. Without a terminal the command gets one of the default
// size.
func (a *app) attachTTY() (_ *smolvm.TTY, restore func(), _ error) {
	tty := &smolvm.TTY{Term: os.Getenv("TERM")}
	fd, ok := terminal(a.Stdin)
	if !ok || background(fd) {
		return tty, func() {}, nil
	}
	before, err := term.MakeRaw(fd)
	if err != nil {
		return nil, nil, fmt.Errorf("set terminal to raw mode: %w", err)
	}
	tty.Size = windowSize(fd)
	changes := make(chan os.Signal, 1)
	signal.Notify(changes, unix.SIGWINCH)
	resizes := make(chan smolvm.WindowSize)
	tty.Resizes = resizes
	over := make(chan struct{})
	go func() {
		for {
			select {
			case <-changes:
			case <-over:
				return
			}
			select {
			case resizes <- windowSize(fd):
			case <-over:
				return
			}
		}
	}()
	return tty, func() {
		signal.Stop(changes)
		close(over)
		_ = term.Restore(fd, before)
	}, nil
}

func windowSize(fd int) smolvm.WindowSize {
	columns, rows, err := term.GetSize(fd)
	if err != nil {
		return smolvm.WindowSize{}
	}
	return smolvm.WindowSize{Columns: columns, Rows: rows}
}
