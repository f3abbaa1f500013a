package vmmfake

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/vmm"
)

// memory is what a guest has in memory, and is saved with it.
type memory struct {
	Files map[string]*node `json:"files"`
	// Hello is the last one; nil: there was none.
	Hello *wire.Hello `json:"greeting,omitempty"`
	// InSession says that the agent was in the middle of a session.
	InSession bool `json:"in_session,omitempty"`
	// Clock is the guest's time, and Uptime how long it has run.
	Clock  time.Time     `json:"clock"`
	Uptime time.Duration `json:"uptime"`
	// Vars are those of the shell that obeys a test; see obey.
	Vars map[string]string `json:"vars,omitempty"`
}

// guest is what runs in the machine: a tree of files, an agent, and programs.
type guest struct {
	machine *machine
	files   *files
	root    *drive // where the files are when they are synced; nil: nowhere
	network guestNetwork

	restored bool // it goes on from what was saved
	script   bool // its init is that of package vmmtest

	mu        sync.Mutex // guards the following
	hello     *wire.Hello
	inSession bool
	identity  identity
	clock     time.Time     // the guest's time when it had run for clockAt
	clockAt   time.Duration // see uptime
	earlier   time.Duration // that it had run for before it was saved
	vars      map[string]string
}

// scriptMark begins an initramfs that is a script for the test's own init.
const scriptMark = "#!vmmfake-init\n"

// newGuest boots a guest, or loads the one that was saved.
func newGuest(m *machine) (*guest, error) {
	g := &guest{machine: m, clock: time.Now(), vars: map[string]string{}}
	g.network.link = m.link
	for _, path := range []string{m.Config.Kernel, m.Config.Initrd} {
		if path == "" {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		g.script = g.script || strings.HasPrefix(string(text), scriptMark)
	}
	if len(m.drives) > 0 && !g.script {
		g.root = m.drives[0]
	}
	if m.Config.Restore != nil {
		saved, err := m.load(*m.Config.Restore)
		if err != nil {
			return nil, err
		}
		g.restored = true
		g.files = &files{nodes: saved.Files}
		g.hello, g.inSession = saved.Hello, saved.InSession && !m.Resets
		maps.Copy(g.vars, saved.Vars)
		g.clock, g.earlier, g.clockAt = saved.Clock, saved.Uptime, saved.Uptime
		return g, nil
	}
	g.files = newFiles()
	g.say("Linux version 6.1.0-vmmfake")
	g.say("Command line: " + m.Config.BootArgs)
	if g.root != nil {
		if err := g.mount(g.root, "/"); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// say prints a line on the console, as a kernel does.
func (g *guest) say(line string) {
	g.machine.cpu.step()
	_, _ = fmt.Fprintf(g.machine.console, "[%12.6f] %s\n", g.uptime().Seconds(), line)
}

// uptime is how long the guest has run.
func (g *guest) uptime() time.Duration {
	return g.earlier + g.machine.cpu.time(g.machine.began)
}

// now is the guest's time.
func (g *guest) now() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.clock.Add(g.uptime() - g.clockAt)
}

func (g *guest) setClock(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.clock, g.clockAt = now, g.uptime()
}

// memory is called while the guest is held.
func (g *guest) memory() memory {
	now := g.now()
	g.mu.Lock()
	defer g.mu.Unlock()
	return memory{
		Files: g.files.copy(true), Hello: g.hello, InSession: g.inSession,
		Clock: now, Uptime: g.uptime(), Vars: g.vars,
	}
}

// The files on a drive: a mark, the length of what follows, and the nodes as JSON.
const (
	diskMark   = "vmmfake files\n"
	diskHeader = int64(len(diskMark)) + 8
)

// mount adds the files of a drive to the tree below a directory. A drive without any has
// none.
func (g *guest) mount(d *drive, dir string) error {
	header := make([]byte, diskHeader)
	if _, err := d.ReadAt(header, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if !bytes.HasPrefix(header, []byte(diskMark)) {
		return nil
	}
	text := make([]byte, binary.BigEndian.Uint64(header[len(diskMark):]))
	if _, err := d.ReadAt(text, diskHeader); err != nil {
		return err
	}
	nodes := map[string]*node{}
	if err := json.Unmarshal(text, &nodes); err != nil {
		return fmt.Errorf("the files on %s: %w", d.config.Path, err)
	}
	g.files.mu.Lock()
	defer g.files.mu.Unlock()
	if dir == "/" {
		for name := range g.files.nodes { // what the disk has not was removed
			if !isVolatile(name) && strings.Count(name, "/") > 1 {
				delete(g.files.nodes, name)
			}
		}
		dir = ""
	}
	for name, n := range nodes {
		if name != "/" {
			g.files.nodes[dir+name] = n
		}
	}
	return nil
}

// sync puts the files on the drive.
func (g *guest) sync() error {
	if g.root == nil || g.root.config.ReadOnly {
		return nil
	}
	text, err := json.Marshal(g.files.copy(false))
	if err != nil {
		return err
	}
	header := binary.BigEndian.AppendUint64([]byte(diskMark), uint64(len(text)))
	if _, err := g.root.WriteAt(append(header, text...), 0); err != nil {
		return err
	}
	return g.root.sync()
}

// start lets the guest run.
func (g *guest) start() {
	switch {
	case g.machine.hosts != nil && !g.machine.has(Silent) && !g.machine.has(NoAgent):
		go g.accept(g.machine.hosts)
	case g.machine.channel == nil || g.machine.has(Silent) || g.machine.has(NoAgent):
	case g.script:
		go g.obey(gated{g.machine.channel, &g.machine.cpu})
	default:
		go g.serve(gated{g.machine.channel, &g.machine.cpu})
	}
}

// powerOff ends the VM as a guest does that shuts down.
func (g *guest) powerOff(detail string) {
	if err := g.sync(); err != nil {
		g.say("sync: " + err.Error())
	}
	g.say("reboot: Power down")
	g.machine.end(vmm.ExitPowerOff, detail)
}

func (g *guest) reboot() {
	_ = g.sync()
	g.say("reboot: Restarting system")
	g.machine.end(vmm.ExitReboot, "")
}

// panicKernel ends the VM as a kernel does that panics.
func (g *guest) panicKernel(message string) {
	g.say("Kernel panic - not syncing: " + message)
	g.machine.end(vmm.ExitPanic, message)
}

// become makes the guest what a hello says.
func (g *guest) become(ctx context.Context, hello wire.Hello) (wire.Identity, error) {
	again := (g.restored || g.current() != nil) && !hello.Continues
	id, err := newIdentity(hello)
	if err != nil {
		return wire.Identity{}, err
	}
	g.setClock(hello.Time)
	g.files.write("/etc/hostname", hello.Hostname+"\n")
	g.files.write("/etc/machine-id", hello.MachineID+"\n")
	g.files.write("/proc/sys/kernel/random/boot_id", hello.BootID+"\n")
	g.mu.Lock()
	g.hello, g.identity = &hello, id
	g.mu.Unlock()
	said := wire.Identity{
		Hostname: hello.Hostname, MachineID: hello.MachineID, BootID: hello.BootID,
		HostKey: ssh.FingerprintSHA256(id.hostKey), Random: randomHex(16),
	}
	if hello.Network != nil {
		said.MAC = hello.Network.MAC
		g.files.write("/sys/class/net/eth0/address", hello.Network.MAC+"\n")
		if err := g.network.adopt(*hello.Network, g.serveTCP); err != nil {
			return wire.Identity{}, err
		}
	}
	if again { // as the agent does: no guest is handed out that can't start programs
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		status := g.run(ctx, &process{args: []string{"true"}})
		if status.signal != "" {
			return wire.Identity{}, errors.New("programs don't run in the guest: the first one has not ended")
		}
	}
	return said, nil
}

func (g *guest) current() *wire.Hello {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.hello
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
