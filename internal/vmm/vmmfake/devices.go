package vmmfake

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"
)

// device is an open file that is none of the tree's.
type device struct {
	read  func([]byte) (int, error) // nil: it is empty
	write func([]byte) (int, error) // nil: what is written is dropped
}

func (d device) Read(p []byte) (int, error) {
	if d.read == nil {
		return 0, io.EOF
	}
	return d.read(p)
}

func (d device) Write(p []byte) (int, error) {
	if d.write == nil {
		return len(p), nil
	}
	return d.write(p)
}

func (device) Close() error { return nil }

func textDevice(format string, args ...any) device {
	return device{read: bytes.NewReader(fmt.Appendf(nil, format+"\n", args...)).Read}
}

// open opens a file or a device, as open(2) does.
func (g *guest) open(name string, flag int, perm fs.FileMode) (io.ReadWriteCloser, error) {
	g.machine.cpu.step()
	name = path.Clean("/" + name)
	if d, ok := g.device(name); ok {
		return d, nil
	}
	stat, err := g.files.stat(name, true)
	if flag&os.O_CREATE != 0 && err != nil {
		at, resolveErr := func() (string, error) {
			g.files.mu.Lock()
			defer g.files.mu.Unlock()
			return g.files.resolve(name, true)
		}()
		if resolveErr == nil {
			err = g.files.put(at, node{Mode: perm & 0o777})
		}
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.ENOENT}
	}
	if stat.IsDir() {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EISDIR}
	}
	if flag&os.O_TRUNC != 0 {
		_ = g.files.change(name, func(n *node) { n.Data = nil })
	}
	return &openFile{files: g.files, name: name, add: flag&os.O_APPEND != 0}, nil
}

// device returns the device of a name.
func (g *guest) device(name string) (io.ReadWriteCloser, bool) {
	switch name {
	case "/dev/null":
		return device{}, true
	case "/dev/zero":
		return device{read: func(p []byte) (int, error) { clear(p); return len(p), nil }}, true
	case "/dev/urandom", "/dev/random":
		return device{read: rand.Read}, true
	case "/dev/console":
		return device{write: func(p []byte) (int, error) {
			g.machine.cpu.step()
			return g.machine.console.Write(p)
		}}, true
	case "/proc/cmdline":
		return textDevice("%s", g.machine.Config.BootArgs), true
	case "/proc/meminfo":
		return textDevice("MemTotal: %d kB", g.machine.Config.MemoryMiB<<10-20<<10), true
	case "/proc/uptime":
		return textDevice("%.2f 0.00", g.uptime().Seconds()), true
	case "/proc/kallsyms":
		return textDevice("%s", strings.Repeat("ffffffff81000000 T startup_64\n", 4<<10)), true
	case "/proc/sys/kernel/random/uuid":
		return textDevice("%s", newUUID()), true
	case "/sys/class/net/eth0/mtu":
		if nic := g.machine.Config.NIC; nic != nil {
			return textDevice("%d", max(nic.MTU, 1)), true
		}
	case "/sys/class/net/eth0/address":
		if nic := g.machine.Config.NIC; nic != nil && g.script {
			return textDevice("%s", nic.MAC), true
		}
	case "/proc/sysrq-trigger":
		return device{write: func(p []byte) (int, error) {
			if bytes.HasPrefix(p, []byte("c")) {
				g.panicKernel("sysrq triggered crash")
			}
			return len(p), nil
		}}, true
	}
	return g.driveDevice(name)
}

// driveDevice returns a drive, or what the kernel shows of one.
func (g *guest) driveDevice(name string) (io.ReadWriteCloser, bool) {
	letter, isDrive := strings.CutPrefix(name, "/dev/vd")
	if rest, found := strings.CutPrefix(name, "/sys/block/vd"); found {
		letter, isDrive = strings.CutSuffix(rest, "/ro")
	}
	if !isDrive || len(letter) != 1 || int(letter[0]-'a') >= len(g.machine.drives) {
		return nil, false
	}
	d := g.machine.drives[letter[0]-'a']
	if strings.HasPrefix(name, "/sys") {
		return textDevice("%s", strconv.Itoa(map[bool]int{false: 0, true: 1}[d.config.ReadOnly])), true
	}
	var at int64
	return device{
		read: func(p []byte) (int, error) {
			n, err := d.ReadAt(p, at)
			at += int64(n)
			return n, err
		},
		write: func(p []byte) (int, error) {
			n, err := d.WriteAt(p, at)
			at += int64(n)
			return n, err
		},
	}, true
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
