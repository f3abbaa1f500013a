package vmmfake

import (
	"encoding/json"
	"io/fs"
	"path"
	"syscall"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/tree"
	"github.com/smolvm/smolvm/internal/agent/wire"
)

// tree serves one copy of our own client.
func (g *guest) tree(newChannel ssh.NewChannel) {
	var request wire.TreeRequest
	if err := json.Unmarshal(newChannel.ExtraData(), &request); err != nil {
		refuse(newChannel, err)
		return
	}
	channel, requests, err := newChannel.Accept()
	if err != nil {
		return
	}
	defer func() { _ = channel.Close() }()
	go ssh.DiscardRequests(requests)
	name := string(request.Path)
	if !path.IsAbs(name) {
		name = path.Join("/root", name)
	}
	out := tree.NewEncoder(channel)
	if request.Extract {
		err = g.receive(tree.NewDecoder(channel), name, request)
	} else {
		err = g.send(out, name, "")
	}
	if err != nil {
		_ = out.Fail(err)
		return
	}
	_ = out.End()
}

// send sends a file or a tree, under a name.
func (g *guest) send(out *tree.Encoder, at, name string) error {
	info, err := g.files.stat(at, name == "")
	if err != nil {
		return err
	}
	entry := tree.Entry{Kind: tree.File, Name: name, Mode: uint32(info.Mode().Perm()), ModTime: info.ModTime(), Size: info.Size()}
	switch {
	case info.IsDir():
		entry.Kind = tree.Dir
	case info.Mode()&fs.ModeSymlink != 0:
		entry.Kind, entry.Link = tree.Symlink, info.node.Link
	}
	if err := out.Begin(entry); err != nil || entry.Kind == tree.Symlink {
		return err
	}
	if entry.Kind == tree.File {
		for data := info.node.Data; len(data) > 0; {
			g.machine.cpu.step()
			piece := data[:min(len(data), 64<<10)]
			if err := out.Data(piece); err != nil {
				return err
			}
			data = data[len(piece):]
		}
		return out.EndFile("")
	}
	children, err := g.files.list(at)
	if err != nil {
		return err
	}
	for _, child := range children {
		if err := g.send(out, path.Join(at, child.Name()), child.Name()); err != nil {
			return err
		}
	}
	return out.Leave()
}

// receive takes a file or a tree, and puts it where the request says.
func (g *guest) receive(in *tree.Decoder, at string, request wire.TreeRequest) error {
	if info, err := g.files.stat(at, true); err == nil && info.IsDir() && !request.Contents && len(request.Name) > 0 {
		at = path.Join(at, string(request.Name))
	} else if request.IntoDir && (err != nil || !info.IsDir()) {
		return &fs.PathError{Op: "open", Path: at, Err: syscall.ENOTDIR}
	}
	current, dirs := at, []string{}
	var file *node
	for {
		event, err := in.Next()
		if err != nil {
			return err
		}
		g.machine.cpu.step()
		switch event.Kind {
		case tree.EventEntry:
			current = at
			if len(dirs) > 0 {
				current = path.Join(dirs[len(dirs)-1], event.Entry.Name)
			}
			n := node{Mode: fs.FileMode(event.Entry.Mode & 0o777), ModTime: event.Entry.ModTime}
			switch event.Entry.Kind {
			case tree.Dir:
				n.Mode |= fs.ModeDir
				dirs = append(dirs, current)
				if info, err := g.files.stat(current, true); err == nil && info.IsDir() {
					continue
				}
				err = g.files.put(current, n)
			case tree.Symlink:
				n.Mode, n.Link = fs.ModeSymlink|0o777, event.Entry.Link
				err = g.files.put(current, n)
			default:
				file = &n
			}
			if err != nil {
				return err
			}
		case tree.EventData:
			file.Data = append(file.Data, event.Data...)
		case tree.EventHole:
			file.Data = append(file.Data, make([]byte, event.Hole)...)
		case tree.EventEndFile:
			if event.Failure == "" {
				if err := g.files.put(current, *file); err != nil {
					return err
				}
			}
		case tree.EventLeave:
			dirs = dirs[:len(dirs)-1]
		case tree.EventEnd:
			return nil
		}
	}
}
