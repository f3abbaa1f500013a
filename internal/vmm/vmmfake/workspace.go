package vmmfake

import (
	"archive/tar"
	"encoding/json"
	"io"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// committed is the file that the layer of a guest has, with what the guest was told of its image.
const committed = "committed"

// workspace sends the guest's root file system, which has one file. It refuses the other operations
// of workspaces, as an agent of an earlier build does.
func (g *guest) workspace(newChannel ssh.NewChannel) {
	var request wire.WorkspaceRequest
	if json.Unmarshal(newChannel.ExtraData(), &request) != nil || request.Root == nil {
		rejectUnknown(newChannel)
		return
	}
	channel, requests, err := newChannel.Accept()
	if err != nil {
		return
	}
	defer func() { _ = channel.Close() }()
	go ssh.DiscardRequests(requests)
	list, err := io.ReadAll(channel)
	if err != nil {
		return
	}
	g.machine.cpu.step()
	archive := tar.NewWriter(channel)
	if archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: committed, Mode: 0o644, Size: int64(len(list))}) != nil {
		return
	}
	if _, err := archive.Write(list); err != nil || archive.Close() != nil {
		return
	}
	_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{0}))
}

func rejectUnknown(channel ssh.NewChannel) {
	_ = channel.Reject(ssh.UnknownChannelType, "the agent has no channel of type "+channel.ChannelType())
}
