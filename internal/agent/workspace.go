package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// Step runs a command as a step of a workspace, and returns how it ended. A command that could
// not be started has ended with status 127, 126 or 125, and says why on its stderr.
func (c *Client) Step(ctx context.Context, command smolvm.Command, step wire.StepRequest) (smolvm.ExitStatus, error) {
	r, err := c.runWorkspace(ctx, command, wire.WorkspaceRequest{Step: &step})
	if err != nil {
		return smolvm.ExitStatus{}, err
	}
	return r.wait(ctx)
}

// Layer writes what has changed in a workspace since the last layer to w, as the archive that
// the guest makes of it: the caller checks it.
func (c *Client) Layer(ctx context.Context, w io.Writer, request wire.LayerRequest) error {
	return c.operate(ctx, nil, w, wire.WorkspaceRequest{Layer: &request})
}

// PutLayer puts an archive into a workspace.
func (c *Client) PutLayer(ctx context.Context, archive io.Reader, request wire.PutRequest) error {
	return c.operate(ctx, archive, nil, wire.WorkspaceRequest{Put: &request})
}

// Root writes what differs between the guest's own root file system and a list of what its image
// has, which layertar.ReadBase reads, to w, as the archive that the guest makes of it: the
// caller checks it. An empty list stands for no image.
func (c *Client) Root(ctx context.Context, list io.Reader, w io.Writer, request wire.RootRequest) error {
	return c.operate(ctx, list, w, wire.WorkspaceRequest{Root: &request})
}

// Changes writes what the guest has changed in a directory of the host, in an overlay of that name,
// to w, as the archive of a layer that the guest makes of it: the caller checks it.
func (c *Client) Changes(ctx context.Context, w io.Writer, overlay string) error {
	return c.operate(ctx, nil, w, wire.WorkspaceRequest{Overlay: overlay})
}

// maxReason bounds what a guest says of an operation that has failed, in bytes.
const maxReason = 2 << 10

// operate does one operation that is no step.
func (c *Client) operate(ctx context.Context, in io.Reader, out io.Writer, request wire.WorkspaceRequest) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var reason clipped
	source := &source{r: in, failed: cancel}
	command := smolvm.Command{Stdout: out, Stderr: &reason}
	if in != nil {
		command.Stdin = source
	}
	r, err := c.runWorkspace(ctx, command, request)
	if err != nil {
		return err
	}
	status, err := r.wait(ctx)
	if err == nil {
		err = context.Cause(ctx) // the source's, which may come after the guest's answer
	}
	if err != nil || status.Success() {
		return err
	}
	text := strings.TrimPrefix(strings.TrimSpace(string(reason)), "smolvm: ")
	if text == "" {
		text = "the operation " + status.String()
	}
	return errors.New("guest: " + wire.Text(text, maxReason))
}

// runWorkspace sends an operation to the guest. The caller waits for it.
func (c *Client) runWorkspace(ctx context.Context, command smolvm.Command, request wire.WorkspaceRequest) (*running, error) {
	var words []byte
	request.Exec, words = execRequest(command).Fold()
	r, err := c.runOver(ctx, wire.WorkspaceChannel, mustJSON(request), words, command)
	if err != nil && strings.Contains(err.Error(), "no channel of type") {
		err = fmt.Errorf("%w; it is the agent of an earlier version of smolvm: boot the VM anew, with an image that this version has built", err)
	}
	return r, err
}

// clipped keeps the beginning of what is written to it.
type clipped []byte

// Write implements [io.Writer].
func (c *clipped) Write(p []byte) (int, error) {
	*c = append(*c, p[:min(len(p), maxReason-len(*c))]...)
	return len(p), nil
}

// source is a reader whose error ends the call, as the guest would take it for the end.
type source struct {
	r      io.Reader
	failed context.CancelCauseFunc
}

// Read implements [io.Reader].
func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.failed(fmt.Errorf("read what is to be put into the guest: %w", err))
	}
	return n, err
}
