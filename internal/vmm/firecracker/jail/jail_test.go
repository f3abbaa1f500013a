package jail_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/namespace/namespacetest"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/jail"
)

// parentRole is the first argument of this test's program when it starts a jail and waits to be
// killed.
const parentRole = "parent"

// jailedName is the name of what stands in for Firecracker.
const jailedName = "firecracker"

func TestMain(m *testing.M) {
	namespacetest.Main()
	if len(os.Args) > 1 && os.Args[1] == parentRole {
		if err := parent(); err != nil {
			fmt.Fprintln(os.Stderr, os.Args[0]+":", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(namespacetest.Run(m))
}

// seen is what a stand-in for Firecracker finds in its jail.
type seen struct {
	UID, GID, PID int
	Args          []string
	Capabilities  []string
	Dir           string
	Names         []string
	Read          map[string]string // contents of files, or errors
	Write         map[string]string // "" or an error
	Devices       map[string]string
	TAP           string
}

// programs returns the jailer, and what stands in for Firecracker: a static program, as that is,
// since nothing else is in its jail.
func programs(t *testing.T) (jailer, firecracker string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("the jailer needs root")
	}
	jailer = testenv.Program(t, "jailer")
	firecracker = filepath.Join(t.TempDir(), jailedName)
	cmd := exec.Command("go", "build", "-o", firecracker, "./testdata/standin")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the stand-in: %v\n%s", err, out)
	}
	return jailer, firecracker
}

// host is what the VMs of a test have on their host.
type host struct {
	*testing.T
	dir                 string
	jailer, firecracker string
	users               jail.Users
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{T: t, dir: t.TempDir()}
	h.jailer, h.firecracker = programs(t)
	h.users = jail.Users{Locks: filepath.Join(h.dir, "users")}
	for name, mode := range map[string]os.FileMode{"kernel": 0o400, "disk-a": 0o600, "disk-b": 0o600} {
		if err := os.WriteFile(filepath.Join(h.dir, name), []byte("of the host"), mode); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func (h *host) user() int {
	h.Helper()
	user, err := h.users.Take()
	if err != nil {
		h.Skip(err)
	}
	h.Cleanup(user.Release)
	return user.ID()
}

func (h *host) config(name string) jail.Config {
	return jail.Config{
		Jailer: h.jailer, Firecracker: h.firecracker, Dir: filepath.Join(h.dir, name), ID: "vm-" + name, User: h.user(),
		Files: []jail.File{
			{Name: "kernel", Path: filepath.Join(h.dir, "kernel")},
			{Name: "drive0", Path: filepath.Join(h.dir, "disk-"+name), Writable: true},
		},
	}
}

// jailedVMM is a jail whose Firecracker runs.
type jailedVMM struct {
	*jail.Jail
	process *namespace.Process
	seen    seen
	stdin   *os.File
}

func (h *host) start(config jail.Config) *jailedVMM {
	h.Helper()
	j, err := jail.New(config)
	if err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() {
		if err := jail.Remove(config.Dir); err != nil {
			h.Error(err)
		}
	})
	stdinRead, stdin, err := os.Pipe()
	if err != nil {
		h.Fatal(err)
	}
	stdout, stdoutWrite, err := os.Pipe()
	if err != nil {
		h.Fatal(err)
	}
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		h.Fatal(err)
	}
	link := os.NewFile(uintptr(ends[0]), "link")
	cmd := exec.Command(config.Firecracker, "--api-sock", "api.sock")
	var errs bytes.Buffer
	logRead, log, err := os.Pipe()
	if err != nil {
		h.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdinRead, stdoutWrite, log
	process, err := j.Start(h.Context(), cmd, nil, namespacetest.Program(), &namespace.Network{Link: link})
	_, _, _, _ = stdinRead.Close(), stdoutWrite.Close(), log.Close(), link.Close()
	if err != nil {
		h.Fatal(err)
	}
	p := &jailedVMM{Jail: j, process: process, stdin: stdin}
	h.Cleanup(func() {
		_, _ = stdin.Close(), unix.Close(ends[1])
		<-process.Done()
		_, _ = stdout.Close(), logRead.Close()
	})
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &p.seen)
	}
	if err != nil {
		_, _ = io.Copy(&errs, logRead)
		h.Fatalf("Firecracker said %q: %v; %s", line, err, errs.String())
	}
	return p
}

// A VMM in a jail has the VM's files and devices, can't reach another's, and leaves nothing.
func TestJail(t *testing.T) {
	h := newHost(t)
	a, b := h.start(h.config("a")), h.start(h.config("b"))
	if a.seen.UID == b.seen.UID {
		t.Errorf("both are user %d", a.seen.UID)
	}
	for _, p := range []*jailedVMM{a, b} {
		s := p.seen
		if s.UID == 0 || s.GID != s.UID || s.Dir != "/" || strings.Join(s.Capabilities, "") != "00" {
			t.Errorf("it is user %d, group %d, in %s, with capabilities %v", s.UID, s.GID, s.Dir, s.Capabilities)
		}
		if got := strings.Join(s.Args, " "); !strings.HasPrefix(got, "--id vm-") || !strings.HasSuffix(got, " --api-sock api.sock") {
			t.Errorf("its arguments are %q", got)
		}
		if s.Read["kernel"] != "of the host" || s.Read["drive0"] != "of the host" || !strings.Contains(s.Read["../../../../etc/passwd"], "no such file") {
			t.Errorf("it reads %q", s.Read)
		}
		if !strings.Contains(s.Write["kernel"], "read-only") || s.Write["drive0"] != "" || s.Write["saved-memory"] != "" {
			t.Errorf("of what it writes: %q", s.Write)
		}
		if s.TAP != "" || s.Devices["/dev/net/tun"] != "" || strings.Contains(s.Devices["/dev/kvm"], "permission") {
			t.Errorf("devices: %q, %q", s.TAP, s.Devices)
		}
		if got := status(t, p.process.PID(), "Uid"); got != strconv.Itoa(s.UID) {
			t.Errorf("process %d is user %s", p.process.PID(), got)
		}
		if s.PID == p.process.PID() {
			t.Error("it is in the host's PID namespace")
		}
		// What it has made is the host's to take.
		if text, err := os.ReadFile(filepath.Join(p.Root(), "saved-memory")); err != nil || string(text) != "written" {
			t.Errorf("what it has saved is %q, %v", text, err)
		}
	}
	// Nothing has changed its owner, and the host has no mount of it.
	for name, want := range map[string]string{"kernel": "of the host", "disk-a": "written", "disk-b": "written"} {
		var stat unix.Stat_t
		text, err := os.ReadFile(filepath.Join(h.dir, name))
		if err == nil {
			err = unix.Stat(filepath.Join(h.dir, name), &stat)
		}
		if err != nil || string(text) != want || stat.Uid != 0 {
			t.Errorf("%s has %q, of user %d, %v", name, text, stat.Uid, err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(mounts, []byte(h.dir)) {
		t.Errorf("%v: %s", err, mounts)
	}
	_ = a.stdin.Close()
	<-a.process.Done()
	if !a.process.Success() {
		t.Errorf("it has ended with %q", a.process.Exit())
	}
	if err := b.process.Signal(unix.SIGTERM); err != nil {
		t.Error(err)
	}
	<-b.process.Done()
	if got := b.process.Exit(); got != "signal: terminated" || b.process.Success() {
		t.Errorf("it has ended with %q", got)
	}
	for _, p := range []*jailedVMM{a, b} {
		dir := filepath.Join(p.Root(), "../../..")
		if err := jail.Remove(dir); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(dir); err == nil {
			t.Errorf("%s is still there", dir)
		}
	}
	if text, err := os.ReadFile(filepath.Join(h.dir, "kernel")); err != nil || string(text) != "of the host" {
		t.Errorf("the shared file is %q, %v", text, err)
	}
}

// A drive may be a block device, which is another one's no more than a file is.
func TestBlockDevice(t *testing.T) {
	h := newHost(t)
	file := filepath.Join(h.dir, "device")
	if err := os.WriteFile(file, append([]byte("of the host"), make([]byte, 1<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Skip("this host has no loop devices: ", err)
	}
	device := strings.TrimSpace(string(out))
	var before, after unix.Stat_t
	if err := unix.Stat(device, &before); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	config := h.config("a")
	config.Files = append(config.Files, jail.File{Name: "drive1", Path: device, Writable: true})
	got := h.start(config).seen
	if got.Read["drive1"] != "of the host" || got.Write["drive1"] != "" {
		t.Errorf("it reads %q, and writes: %q", got.Read["drive1"], got.Write["drive1"])
	}
	if err := unix.Stat(device, &after); err != nil || after.Uid != before.Uid || after.Gid != before.Gid || after.Mode != before.Mode {
		t.Errorf("the host's device file has changed: %+v, %+v, %v", before, after, err)
	}
}

// status returns the first value of a field in /proc/<pid>/status.
func status(t *testing.T, pid int, field string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, found := strings.CutPrefix(line, field+":"); found {
			return strings.Fields(value)[0]
		}
	}
	t.Fatalf("process %d has no %s", pid, field)
	return ""
}

// parent starts a jail, prints who is in it, and waits to be killed.
func parent() error {
	var config jail.Config
	if err := json.Unmarshal([]byte(os.Args[2]), &config); err != nil {
		return err
	}
	j, err := jail.New(config)
	if err != nil {
		return err
	}
	cmd := exec.Command(config.Firecracker)
	read, _, err := os.Pipe() // which does not end before this process does
	if err != nil {
		return err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = read, os.Stdout, os.Stderr
	process, err := j.Start(context.Background(), cmd, nil, namespacetest.Program(), nil)
	if err != nil {
		return err
	}
	start, err := proc.StartTime(process.PID())
	if err != nil {
		return err
	}
	fmt.Println(process.PID(), start)
	<-process.Done()
	return nil
}

// The kernel ends a VMM whose shim was killed, though it has another user; what is left is
// removed by whoever looks next.
func TestParentKilled(t *testing.T) {
	h := newHost(t)
	config := h.config("a")
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], parentRole, string(text))
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stdout)
	var pid int
	var start uint64
	for range 2 { // one is Firecracker's
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscan(line, &pid, &start); err != nil {
			continue
		}
	}
	if pid == 0 || !proc.Alive(pid, start) {
		t.Fatalf("process %d does not run", pid)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if err := proc.Wait(t.Context(), pid, start); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(config.Dir); err != nil {
		t.Fatal("there is nothing left to remove: ", err)
	}
	if err := jail.Remove(config.Dir); err != nil {
		t.Error(err)
	}
	if err := jail.Remove(config.Dir); err != nil {
		t.Error("of what is gone: ", err)
	}
}

// What can't be a jail is refused before anything is made, or removed.
func TestRefused(t *testing.T) {
	h := newHost(t)
	for name, change := range map[string]func(*jail.Config){
		"no id":           func(c *jail.Config) { c.ID = "a_b" },
		"a long id":       func(c *jail.Config) { c.ID = strings.Repeat("a", 65) },
		"root":            func(c *jail.Config) { c.User = 0 },
		"relative":        func(c *jail.Config) { c.Dir = "jail" },
		"no Firecracker":  func(c *jail.Config) { c.Firecracker = filepath.Join(h.dir, "none") },
		"a directory":     func(c *jail.Config) { c.Files[0].Name = "a/b" },
		"above":           func(c *jail.Config) { c.Files[0].Name = ".." },
		"a taken name":    func(c *jail.Config) { c.Files[0].Name = "dev" },
		"the program's":   func(c *jail.Config) { c.Files[0].Name = jailedName },
		"two of a name":   func(c *jail.Config) { c.Files[0].Name = c.Files[1].Name },
		"no file":         func(c *jail.Config) { c.Files[0].Path = filepath.Join(h.dir, "none") },
		"no regular file": func(c *jail.Config) { c.Files[0].Path = h.dir },
	} {
		config := h.config("a")
		change(&config)
		if _, err := jail.New(config); err == nil {
			t.Errorf("%s: it is made", name)
		}
		if filepath.IsAbs(config.Dir) {
			if err := jail.Remove(config.Dir); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	link := filepath.Join(h.dir, "link")
	if err := os.Symlink(h.dir, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"", "jail", "/", "/proc", link, filepath.Join(h.dir, "kernel")} {
		if err := jail.Remove(path); err == nil {
			t.Errorf("%q: it is removed", path)
		}
	}
}
