package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/tree"
	"github.com/smolvm/smolvm/internal/agent/treetar"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// CopyOptions says how to copy. The zero value is useful.
type CopyOptions struct {
	// IntoDir requires the target to be an existing directory.
	IntoDir bool
	// KeepLinks makes symbolic links from a guest wherever they lead.
	KeepLinks bool
	// Limits bounds what is taken from a guest.
	Limits tree.Limits
	// Note is called for all that is left out or done in another way, by one goroutine
	// at a time; it may be nil.
	Note func(Side, tree.Note)
}

// Side is one side of a copy.
type Side int

// The sides of a copy.
const (
	Source Side = iota
	Target
)

// maxNotes is how many notes of a copy are passed on: of each side, of failures and of
// others. What a guest sends is not to flood the caller.
const maxNotes = 20

// ErrIncomplete is matched by the error of a copy that has left out what it could not
// read or write, and copied the rest.
var ErrIncomplete = smolvm.ErrCopyIncomplete

// notes passes notes on and counts them.
type notes struct {
	mu     sync.Mutex
	pass   func(Side, tree.Note)
	failed int
	first  tree.Note // of those that failed
	told   [2][2]int // by side, others and those that failed
	closed bool
}

// of returns what takes the notes of a side.
func (n *notes) of(side Side) func(tree.Note) {
	return func(note tree.Note) { n.add(side, note) }
}

func (n *notes) add(side Side, note tree.Note) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return
	}
	kind := 0
	if note.Failed {
		kind = 1
		if n.failed++; n.failed == 1 {
			n.first = note
		}
	}
	if n.told[side][kind]++; n.told[side][kind] <= maxNotes && n.pass != nil {
		n.pass(side, note)
	}
}

// end returns the result of a copy, which had such an error. No note is passed on
// after it.
func (n *notes) end(err error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	for side, told := range n.told {
		if more := told[0] - maxNotes; more > 0 && n.pass != nil {
			n.pass(Side(side), tree.Note{Text: fmt.Sprintf("%d more files like these", more)})
		}
	}
	switch {
	case err != nil || n.failed == 0:
		return err
	case n.failed == 1:
		return fmt.Errorf("a file could not be copied (%w): %s", ErrIncomplete, n.first)
	}
	return fmt.Errorf("%d files could not be copied (%w), such as %s", n.failed, ErrIncomplete, n.first)
}

// CopyTo copies a file or a tree into the guest.
func (c *Client) CopyTo(ctx context.Context, hostPath, guestPath string, opts CopyOptions) error {
	request, err := extractRequest(guestPath, opts)
	if err == nil {
		err = tree.CheckPath(hostPath)
	}
	if err != nil {
		return err
	}
	name, contents := tree.SourceName(hostPath)
	request.Name, request.Contents = []byte(name), contents
	notes := &notes{pass: opts.Note}
	return notes.end(c.send(ctx, request, notes, func(ctx context.Context, out *tree.Encoder) error {
		return tree.Send(ctx, out, hostPath, notes.of(Source))
	}))
}

// CopyFrom copies a file or a tree of the guest to the host. The guest is not trusted:
// see [tree.Receive].
func (c *Client) CopyFrom(ctx context.Context, guestPath, hostPath string, opts CopyOptions) error {
	if err := errors.Join(tree.CheckPath(guestPath), tree.CheckPath(hostPath)); err != nil {
		return err
	}
	name, contents := tree.SourceName(guestPath)
	target := tree.Target{
		Path: hostPath, Name: name, Contents: contents, IntoDir: opts.IntoDir,
		Untrusted: true, KeepLinks: opts.KeepLinks,
	}
	notes := &notes{pass: opts.Note}
	return notes.end(c.receive(ctx, guestPath, opts, notes, func(ctx context.Context, in *tree.Decoder) error {
		return tree.Receive(ctx, in, target, notes.of(Target))
	}))
}

// CopyBetween copies a file or a tree of one guest to another one. Neither is trusted
// with anything but what is copied.
func CopyBetween(ctx context.Context, from *Client, fromPath string, to *Client, toPath string, opts CopyOptions) error {
	request, err := extractRequest(toPath, opts)
	if err == nil {
		err = tree.CheckPath(fromPath)
	}
	if err != nil {
		return err
	}
	name, contents := tree.SourceName(fromPath)
	request.Name, request.Contents = []byte(name), contents
	request.Untrusted, request.KeepLinks = true, opts.KeepLinks
	notes := &notes{pass: opts.Note}
	return notes.end(from.receive(ctx, fromPath, opts, notes, func(ctx context.Context, in *tree.Decoder) error {
		return to.send(ctx, request, notes, func(_ context.Context, out *tree.Encoder) error {
			return tree.Relay(in, out)
		})
	}))
}

// PutTar puts what is in a tar stream into an existing directory of the guest.
func (c *Client) PutTar(ctx context.Context, r io.Reader, guestPath string, opts CopyOptions) error {
	opts.IntoDir = true
	request, err := extractRequest(guestPath, opts)
	if err != nil {
		return err
	}
	request.Contents = true
	notes := &notes{pass: opts.Note}
	return notes.end(c.send(ctx, request, notes, func(_ context.Context, out *tree.Encoder) error {
		return treetar.Read(r, out, notes.of(Source))
	}))
}

// GetTar writes a file or a tree of the guest to w, as a tar stream.
func (c *Client) GetTar(ctx context.Context, guestPath string, w io.Writer, opts CopyOptions) error {
	if err := tree.CheckPath(guestPath); err != nil {
		return err
	}
	name, _ := tree.SourceName(guestPath)
	notes := &notes{pass: opts.Note}
	return notes.end(c.receive(ctx, guestPath, opts, notes, func(_ context.Context, in *tree.Decoder) error {
		return treetar.Write(w, in, treetar.Options{Name: name, KeepLinks: opts.KeepLinks}, notes.of(Source))
	}))
}

func extractRequest(guestPath string, opts CopyOptions) (wire.TreeRequest, error) {
	return wire.TreeRequest{Extract: true, Path: []byte(guestPath), IntoDir: opts.IntoDir}, tree.CheckPath(guestPath)
}

// openTree opens the channel of a copy.
func (c *Client) openTree(ctx context.Context, request wire.TreeRequest) (*call, error) {
	call, err := c.open(ctx, wire.TreeChannel, mustJSON(request))
	if err != nil {
		if strings.Contains(err.Error(), "no channel of type") {
			err = fmt.Errorf("%w; it is the agent of another version of smolvm: build the VM's image again", err)
		}
		return nil, err
	}
	return call, nil
}

// receive runs a copy out of the guest: take reads what comes, until ctx is done.
func (c *Client) receive(ctx context.Context, guestPath string, opts CopyOptions, notes *notes, take func(context.Context, *tree.Decoder) error) error {
	call, err := c.openTree(ctx, wire.TreeRequest{Path: []byte(guestPath)})
	if err != nil {
		return err
	}
	// A channel is closed when the guest says so too, so nobody but this goroutine
	// waits for what comes over it.
	reader, writer := io.Pipe()
	go func() {
		_, err := io.Copy(writer, call)
		_ = writer.CloseWithError(err)
	}()
	in := tree.NewDecoder(reader)
	in.Limits, in.Note = opts.Limits, notes.of(Source)
	taken := make(chan error, 1)
	go func() { taken <- take(ctx, in) }()
	err = await(ctx, taken, func(cause error) { _ = reader.CloseWithError(cause); _ = writer.CloseWithError(cause) })
	_ = reader.CloseWithError(io.ErrClosedPipe)
	call.abandon()
	return call.explain(describeCopy(err))
}

// send runs a copy into the guest: give writes it, and the guest answers how it went.
func (c *Client) send(ctx context.Context, request wire.TreeRequest, notes *notes, give func(context.Context, *tree.Encoder) error) error {
	call, err := c.openTree(ctx, request)
	if err != nil {
		return err
	}
	reader, writer := io.Pipe()
	go func() {
		_, err := io.Copy(call, reader)
		_ = reader.CloseWithError(errors.Join(err, io.ErrClosedPipe))
	}()
	answered := make(chan error, 1)
	go func() {
		answer := tree.NewDecoder(call)
		answer.Note = notes.of(Target)
		answered <- answer.Reply()
	}()
	given := make(chan error, 1)
	go func() { given <- give(ctx, tree.NewEncoder(writer)) }()
	stop := func(cause error) { _ = reader.CloseWithError(cause); _ = writer.CloseWithError(cause) }
	ended := make(chan error, 1)
	go func() {
		select {
		case err := <-given:
			// An end of the channel is the guest's doing, and the guest says why.
			if err != nil && !errors.Is(err, io.ErrClosedPipe) {
				ended <- err
				return
			}
			ended <- <-answered
		case err := <-answered:
			if err == nil {
				err = <-given // all is taken, so it is given
			}
			ended <- err
		}
	}()
	err = await(ctx, ended, stop)
	stop(io.ErrClosedPipe)
	call.abandon()
	return call.explain(describeCopy(err))
}

// cleanUpTime is how long a copy that is given up may take to remove what it has begun.
// It waits for nothing but the disk then; if that hangs, the caller is not to.
const cleanUpTime = time.Second

// await returns how something ended, or what ended ctx. It is then stopped.
func await(ctx context.Context, ended <-chan error, stop func(error)) error {
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	cause := context.Cause(ctx)
	stop(cause)
	timer := time.NewTimer(cleanUpTime)
	defer timer.Stop()
	select {
	case err := <-ended:
		if err == nil {
			return nil // just in time
		}
	case <-timer.C:
	}
	return cause
}

func describeCopy(err error) error {
	if tree.IsRemote(err) {
		return fmt.Errorf("guest: %w", err)
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("connection to the guest was lost before the copy ended: %w", err)
	}
	return err
}
