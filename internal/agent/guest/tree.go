package guest

import (
	"context"
	"errors"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/tree"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// tree serves one copy of our own client.
func (l login) tree(newChannel ssh.NewChannel) {
	var request wire.TreeRequest
	err := decode(newChannel, &request)
	if err == nil && l.user.uid != 0 {
		err = errors.New("only root may copy trees; use sftp")
	}
	if err != nil {
		refuse(newChannel, err)
		return
	}
	channel, requests, err := newChannel.Accept()
	if err != nil {
		return
	}
	defer func() { _ = channel.Close() }()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { // until the client closes the channel
		ssh.DiscardRequests(requests)
		cancel()
	}()
	serveTree(ctx, channel, request, l.user.home)
}

// serveTree sends or receives one tree. Relative paths are below home, as with scp.
func serveTree(ctx context.Context, channel ssh.Channel, request wire.TreeRequest, home string) {
	path := string(request.Path)
	if path != "" && path[0] != '/' {
		path = home + "/" + path // as it is: "." at its end has a meaning
	}
	out := tree.NewEncoder(channel)
	var err error
	if request.Extract {
		target := tree.Target{
			Path:      path,
			Name:      string(request.Name),
			Contents:  request.Contents,
			IntoDir:   request.IntoDir,
			Untrusted: request.Untrusted,
			KeepLinks: request.KeepLinks,
		}
		note := func(n tree.Note) { _ = out.Note(n) }
		if err = tree.Receive(ctx, tree.NewDecoder(channel), target, note); err == nil {
			err = out.End()
		}
	} else {
		err = tree.Send(ctx, out, path, func(n tree.Note) { _ = out.Note(n) })
	}
	if err != nil {
		_ = out.Fail(err)
	}
}
