package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/image"
)

// bare starts QEMU as it was started for a VM, with nothing of ours around it, and
// returns how long it took until the agent answered.
func (b *bench) bare(line []string) (time.Duration, error) {
	path := filepath.Join(b.dir, "bare.qcow2")
	images, err := image.Open(filepath.Join(b.m.DataDir(), "images"))
	if err != nil {
		return 0, err
	}
	base, err := images.Get(b.ctx, "base")
	if err != nil {
		return 0, err
	}
	if err := disk.CreateOverlay(b.ctx, disk.Overlay{Path: path, Base: base.RootfsPath, BaseFormat: disk.Raw}); err != nil {
		return 0, err
	}
	defer func() { _ = os.Remove(path) }()
	for i, word := range line {
		switch {
		case strings.HasPrefix(word, `{"node-name":"drive0"`):
			if line[i], err = withFile(word, path); err != nil {
				return 0, err
			}
		}
	}
	console, err := os.OpenFile(filepath.Join(b.dir, "bare.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return 0, err
	}
	files, ours, err := inherited(line, console, path)
	if err != nil {
		return 0, err
	}
	ourChannel := os.NewFile(uintptr(ours[1]), "channel")
	channel, err := net.FileConn(ourChannel)
	if err != nil {
		return 0, err
	}
	hello, err := newHello()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	cmd := exec.CommandContext(b.ctx, line[0], line[1:]...)
	cmd.ExtraFiles = files
	err = cmd.Start()
	for _, file := range files {
		_ = file.Close() // so that the channel ends if QEMU does
	}
	if err != nil {
		return 0, err
	}
	_, _, err = agent.Handshake(b.ctx, channel, hello)
	took := time.Since(began)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	_ = ourChannel.Close()
	for _, fd := range []int{ours[0], ours[2]} {
		_ = unix.Close(fd)
	}
	if err != nil {
		return 0, fmt.Errorf("bare QEMU: %w", err)
	}
	return took, nil
}

// inherited returns the files that QEMU is to inherit by its command line, from descriptor 3 on,
// and our ends of the sockets among them: for QMP, the guest channel and the network. Own is the
// disk in place of the VM's own, which is gone with it.
func inherited(line []string, console *os.File, own string) (files []*os.File, ours [3]int, err error) {
	byFD := map[int]*os.File{}
	for _, word := range line {
		options := map[string]string{}
		for option := range strings.SplitSeq(word, ",") {
			name, value, _ := strings.Cut(option, "=")
			options[name] = value
		}
		fd, err := strconv.Atoi(options["fd"])
		if err != nil {
			continue
		}
		socket, kind := slices.Index([]string{"qmp", "channel", "net"}, options["id"]), unix.SOCK_STREAM
		switch {
		case socket >= 0:
			if options["id"] == "net" {
				kind = unix.SOCK_DGRAM
			}
			ends, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return nil, ours, err
			}
			ours[socket], byFD[fd] = ends[0], os.NewFile(uintptr(ends[1]), "theirs")
		case options["opaque"] != "": // a disk
			byFD[fd], err = os.Open(options["opaque"])
			if errors.Is(err, fs.ErrNotExist) {
				byFD[fd], err = os.Open(own)
			}
			if err != nil {
				return nil, ours, err
			}
		default:
			byFD[fd] = console
		}
	}
	for fd := 3; len(files) < len(byFD); fd++ {
		if byFD[fd] == nil {
			return nil, ours, fmt.Errorf("descriptor %d is not in QEMU's command line", fd)
		}
		files = append(files, byFD[fd])
	}
	return files, ours, nil
}

func newHello() (wire.Hello, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return wire.Hello{}, err
	}
	return wire.Hello{
		Hostname:  "bare",
		MachineID: strings.Repeat("0", 32),
		HostKey:   key,
		Time:      time.Now(),
	}, nil
}

// withFile returns the description of a disk with another file at its top.
func withFile(disk, path string) (string, error) {
	var node struct {
		Name     string          `json:"node-name"`
		Driver   string          `json:"driver"`
		ReadOnly bool            `json:"read-only"`
		Discard  string          `json:"discard"`
		File     map[string]any  `json:"file"`
		Backing  json.RawMessage `json:"backing"`
	}
	if err := json.Unmarshal([]byte(disk), &node); err != nil {
		return "", err
	}
	node.File["filename"] = path
	text, err := json.Marshal(node)
	return string(text), err
}
