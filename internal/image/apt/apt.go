// Package apt runs the host's package manager with directories of its caller's. That needs no
// privilege and changes nothing of the host, and apt itself checks the signatures.
package apt

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"
)

// killDelay is how long what apt has started may go on after it was killed.
const killDelay = 5 * time.Second

// ErrMissing reports that a program of apt's, or dpkg's, is not on this host.
var ErrMissing = errors.New("is not on this host")

// Client runs programs of apt's.
type Client struct {
	dir     string
	options []string
}

// New returns a client whose programs run in dir, with options such as
// "Dir::Cache=/somewhere". The error matches [ErrMissing] where there is no apt.
func New(dir string, options ...string) (*Client, error) {
	for _, program := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("%s %w", program, ErrMissing)
		}
	}
	c := &Client{dir: dir}
	// Root's apt would become a user that can't write to dir.
	c.Add(append([]string{"Debug::NoLocking=1", "APT::Sandbox::User=" + userName()}, options...)...)
	return c, nil
}

// Add adds options to those that all programs get.
func (c *Client) Add(options ...string) {
	for _, option := range options {
		c.options = append(c.options, "-o", option)
	}
}

// AddFile adds a file of configuration, which is read after the host's.
func (c *Client) AddFile(path string) { c.options = append(c.options, "-c", path) }

func userName() string {
	if os.Getuid() == 0 {
		return "root"
	}
	return ""
}

// command prepares a program of apt's.
func (c *Client) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, append(slices.Clip(c.options), args...)...)
	cmd.Dir = c.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.WaitDelay = killDelay
	return cmd
}

// Error reports that a program of apt's did not succeed.
type Error struct {
	Program string
	// Out is what it wrote, and Complaint what it complained of.
	Out, Complaint string
	Err            error
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s: %v: %s", e.Program, e.Err, LastWords(e.Complaint))
}

func (e *Error) Unwrap() error { return e.Err }

// Run runs a program of apt's and returns what it wrote and what it complained of. An error of
// the program is an [Error].
func (c *Client) Run(ctx context.Context, name string, args ...string) (out, complaint string, err error) {
	cmd := c.command(ctx, name, args...)
	var outBuf, errBuf bytes.Buffer
	cmd.Stdout, cmd.Stderr = &outBuf, &errBuf
	if err := cmd.Run(); err != nil {
		return "", "", &Error{Program: name + " " + strings.Join(args, " "), Out: outBuf.String(), Complaint: errBuf.String(), Err: err}
	}
	return outBuf.String(), errBuf.String(), nil
}

// Fetch runs apt-get and tells how much it has fetched, in percent. An error of the program is
// an [Error].
func (c *Client) Fetch(ctx context.Context, progress func(percent float64), args ...string) (complaint string, err error) {
	read, write, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer func() { _ = read.Close() }()
	// apt reports to descriptor 3, the first extra file.
	cmd := c.command(ctx, "apt-get", append([]string{"-o", "APT::Status-Fd=3"}, args...)...)
	cmd.ExtraFiles = []*os.File{write}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	err = cmd.Start()
	_ = write.Close()
	if err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { _ = read.Close() })
	readProgress(read, progress)
	stop()
	if err := cmd.Wait(); err != nil {
		return "", &Error{Program: "apt-get " + args[0], Complaint: errs.String(), Err: err}
	}
	return errs.String(), nil
}

// readProgress reads lines such as "dlstatus:n:percent:text" until apt is done.
func readProgress(r io.Reader, progress func(percent float64)) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if fields := strings.SplitN(lines.Text(), ":", 4); len(fields) == 4 && fields[0] == "dlstatus" {
			if percent, err := strconv.ParseFloat(fields[2], 64); err == nil {
				progress(percent)
			}
		}
	}
}

// LastWords returns the end of a program's complaint, as one line.
func LastWords(text string) string {
	lines := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' })
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}
