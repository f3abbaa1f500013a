package cgroup

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/proc"
)

// Roles of the test's own program as a child.
const (
	findRole = "find" // prints what a user finds below a root
	growRole = "grow" // takes memory
	spinRole = "spin" // takes processor time
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case findRole:
			fmt.Print(describe(Find(os.Args[2])))
			return
		case growRole:
			size, _ := strconv.Atoi(os.Args[2])
			memory := make([]byte, size)
			for i := 0; i < len(memory); i += 4096 {
				memory[i] = 1
			}
			return
		case spinRole:
			until, _ := time.ParseDuration(os.Args[2])
			for began := time.Now(); time.Since(began) < until; {
			}
			return
		}
	}
	os.Exit(m.Run())
}

// describe tells of a Site, one controller a line.
func describe(s Site) string {
	var b strings.Builder
	for _, controller := range controllers {
		fmt.Fprintf(&b, "%s: ", controller)
		switch why := s.Why(controller); {
		case why != nil:
			fmt.Fprintln(&b, why)
		case s.v1[controller] != "":
			fmt.Fprintln(&b, "v1")
		default:
			fmt.Fprintln(&b, "v2")
		}
	}
	return b.String()
}

// layout makes files below a directory; those whose name ends in / are directories.
func layout(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		dir := filepath.Dir(path)
		if strings.HasSuffix(name, "/") {
			dir = path
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if dir == path {
			continue
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const (
	v1Mounts = `30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
`
	v2Mount     = "31 24 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
	hybridMount = "34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)

// group2 are the files of a group of version 2.
func group2(dir, has, enabled, procs string) map[string]string {
	return map[string]string{
		dir + "/cgroup.controllers":     has + "\n",
		dir + "/cgroup.subtree_control": enabled + "\n",
		dir + "/cgroup.procs":           procs,
		dir + "/cgroup.type":            "domain\n",
	}
}

func merge(all ...map[string]string) map[string]string {
	merged := map[string]string{}
	for _, files := range all {
		maps.Copy(merged, files)
	}
	return merged
}

func TestFind(t *testing.T) {
	t.Parallel()
	const top = "sys/fs/cgroup"
	session := merge(
		group2(top, "cpu memory pids io", "cpu memory pids", ""),
		group2(top+"/user.slice", "cpu memory pids", "memory pids", ""),
		group2(top+"/user.slice/session.scope", "memory pids", "", "1\n"),
		map[string]string{"proc/self/mountinfo": v2Mount, "proc/self/cgroup": "0::/user.slice/session.scope\n"},
	)
	for name, test := range map[string]struct {
		files map[string]string
		want  string
		// places are the directories, by controller.
		places map[string]string
	}{
		"nothing mounted": {
			files: map[string]string{"proc/self/mountinfo": "", "proc/self/cgroup": ""},
			want:  "memory: no control groups are mounted\npids: no control groups are mounted\ncpu: no control groups are mounted\n",
		},
		"no /proc": {
			want: "memory: no control groups are mounted\npids: no control groups are mounted\ncpu: no control groups are mounted\n",
		},
		"v1": {
			files: map[string]string{
				"proc/self/mountinfo": v1Mounts, "proc/self/cgroup": "3:pids:/\n2:memory:/a/b\n1:cpu,cpuacct:/\n0::/\n",
				top + "/cpu,cpuacct/": "", top + "/memory/a/b/": "", top + "/pids/": "",
			},
			want:   "memory: v1\npids: v1\ncpu: v1\n",
			places: map[string]string{Memory: top + "/memory/a/b", PIDs: top + "/pids", CPU: top + "/cpu,cpuacct"},
		},
		"v1 in a container that sees its own part": {
			files: map[string]string{
				"proc/self/mountinfo":    "32 30 0:28 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
				"proc/self/cgroup":       "2:memory:/docker/abc/inner\n",
				top + "/memory/inner/":   "",
				top + "/memory/dockerx/": "",
			},
			want:   "memory: v1\npids: no control groups are mounted\ncpu: no control groups are mounted\n",
			places: map[string]string{Memory: top + "/memory/inner"},
		},
		"hybrid, with all controllers in v1": {
			files: merge(group2(top+"/unified", "hugetlb", "", "1\n"), map[string]string{
				"proc/self/mountinfo": v1Mounts + hybridMount, "proc/self/cgroup": "3:pids:/\n2:memory:/\n1:cpu,cpuacct:/\n0::/\n",
				top + "/cpu,cpuacct/": "", top + "/memory/": "", top + "/pids/": "",
			}),
			want: "memory: v1\npids: v1\ncpu: v1\n",
		},
		"hybrid, with one controller in v2": {
			files: merge(group2(top+"/unified", "pids", "pids", ""), map[string]string{
				"proc/self/mountinfo": strings.Replace(v1Mounts, "rw,pids", "rw,freezer", 1) + hybridMount, "proc/self/cgroup": "2:memory:/\n1:cpu,cpuacct:/\n0::/\n",
				top + "/cpu,cpuacct/": "", top + "/memory/": "",
			}),
			want: "memory: v1\npids: v2\ncpu: v1\n",
		},
		"v2, root in a session": {files: session, want: "memory: v2\npids: v2\ncpu: v2\n"},
		"v2, a container's own part is full": {
			files: merge(group2(top, "cpu memory pids", "", "1\n"), map[string]string{
				"proc/self/mountinfo": v2Mount, "proc/self/cgroup": "0::/\n",
			}),
			want: "memory: the control group that this process is in can't be divided\n" +
				"pids: the control group that this process is in can't be divided\n" +
				"cpu: the control group that this process is in can't be divided\n",
		},
		"v2, without memory": {
			files: merge(group2(top, "pids", "pids", ""), map[string]string{
				"proc/self/mountinfo": v2Mount, "proc/self/cgroup": "0::/\n",
			}),
			want: "memory: this kernel, or the group that this process is in, does not have it\npids: v2\n" +
				"cpu: this kernel, or the group that this process is in, does not have it\n",
		},
		"v2, a path outside of what is seen": {
			files: merge(group2(top, "cpu memory pids", "cpu memory pids", ""), map[string]string{
				"proc/self/mountinfo": v2Mount, "proc/self/cgroup": "0::/../../x\n",
			}),
			want: "memory: v2\npids: v2\ncpu: v2\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := layout(t, test.files)
			s := Find(root)
			if got := describe(s); got != test.want {
				t.Errorf("found\n%swant\n%s", got, test.want)
			}
			for controller, want := range test.places {
				if got := s.v1[controller]; got != filepath.Join(root, want) {
					t.Errorf("groups for %s are made in %s, want %s", controller, got, want)
				}
			}
		})
	}
	// The nearest place that can do it is taken first.
	root := layout(t, session)
	places := Find(root).v2
	if len(places) != 2 || places[0].dir != filepath.Join(root, top, "user.slice") {
		t.Errorf("places are %+v", places)
	}
}

// What this user may not write to is not used, and the reason is given.
func TestFindWithoutAccess(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root, to become somebody else")
	}
	const top = "sys/fs/cgroup"
	files := map[string]string{
		"proc/self/mountinfo": v1Mounts, "proc/self/cgroup": "3:pids:/\n2:memory:/\n1:cpu,cpuacct:/\n",
		top + "/cpu,cpuacct/": "", top + "/memory/": "", top + "/pids/": "",
	}
	ask := func(t *testing.T, root string, attr *syscall.SysProcAttr) string {
		t.Helper()
		program := filepath.Join(root, "program")
		text, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(program, text, 0o755); err != nil {
			t.Fatal(err)
		}
		for dir := root; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
			_ = os.Chmod(dir, 0o755)
		}
		cmd := exec.Command(program, findRole, root)
		cmd.SysProcAttr = attr
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	t.Run("another user", func(t *testing.T) {
		const nobody = 65534
		got := ask(t, layout(t, files), &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}})
		const want = "memory: this user may not make control groups\npids: this user may not make control groups\ncpu: this user may not make control groups\n"
		if got != want {
			t.Errorf("found\n%swant\n%s", got, want)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		root := layout(t, files)
		result := make(chan string)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread has mounts of its own
			defer close(result)
			memory := filepath.Join(root, top, "memory")
			if err := errors.Join(
				unix.Unshare(unix.CLONE_NEWNS|unix.CLONE_FS),
				unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
				unix.Mount(memory, memory, "", unix.MS_BIND, ""),
				unix.Mount("", memory, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""),
			); err != nil {
				t.Error(err)
				return
			}
			result <- describe(Find(root))
		}()
		const want = "memory: the control groups are mounted read-only, as in a container\npids: v1\ncpu: v1\n"
		if got := <-result; got != want {
			t.Errorf("found\n%swant\n%s", got, want)
		}
	})
}

func TestCreateFailsWithReason(t *testing.T) {
	t.Parallel()
	for _, limits := range []Limits{{MemoryBytes: 1 << 30}, {CPUs: 1}} {
		if _, err := (Site{}).Create("x", limits); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "no control groups") {
			t.Errorf("Create(%+v) = %v", limits, err)
		}
	}
}

// realSite is this host's, if groups can be made.
func realSite(t *testing.T, controllers ...string) Site {
	t.Helper()
	s := Find("/")
	for _, controller := range controllers {
		if err := s.Why(controller); err != nil {
			t.Skipf("%s can't be bounded here: %v", controller, err)
		}
	}
	return s
}

func create(t *testing.T, s Site, limits Limits) *Group {
	t.Helper()
	g, err := s.Create(fmt.Sprintf("test-%d-%d", os.Getpid(), time.Now().UnixNano()), limits)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		path := g.Path()
		if err := g.Remove(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left", path)
		}
	})
	return g
}

// run runs the test's program in the group, and returns how it ended.
func run(t *testing.T, g *Group, role, argument string) *proc.Child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", role, argument)
	within, closeFD, err := g.Within(cmd)
	if err != nil {
		t.Fatal(err)
	}
	defer closeFD()
	child, err := proc.StartIn(cmd, within)
	if err != nil {
		t.Fatal(err)
	}
	return child
}

// On this host's real groups: a program is in its group from the beginning, is ended when
// it takes more memory than it may, and this process is where it was.
func TestMemoryIsBounded(t *testing.T) {
	s := realSite(t, Memory)
	before, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	g := create(t, s, Limits{MemoryBytes: 64 << 20, Tasks: 100})
	small := run(t, g, growRole, strconv.Itoa(16<<20))
	if <-small.Done(); !small.Success() || g.Killed() {
		t.Errorf("a small program: %s, killed %v", small.Exit(), g.Killed())
	}
	large := run(t, g, growRole, strconv.Itoa(256<<20))
	if <-large.Done(); large.Exit() != "signal: killed" || !g.Killed() {
		t.Errorf("a large program: %s, killed %v", large.Exit(), g.Killed())
	}
	after, err := os.ReadFile("/proc/self/cgroup")
	if err != nil || string(before) != string(after) {
		t.Errorf("this process was in\n%s, now in\n%s", before, after)
	}
}

func TestTasksAreBounded(t *testing.T) {
	g := create(t, realSite(t, PIDs), Limits{Tasks: 3})
	child := run(t, g, growRole, "1") // the runtime of Go has more threads than that
	if <-child.Done(); child.Success() {
		t.Error("a program with more threads than it may have has ended well")
	}
}

// A quarter of a processor is what a program gets, by its own time and not the clock's.
func TestCPUIsBounded(t *testing.T) {
	s := realSite(t, CPU, Memory)
	for name, late := range map[string]bool{"from the beginning": false, "later": true} {
		t.Run(name, func(t *testing.T) {
			const share = 0.25
			limits := Limits{MemoryBytes: 1 << 30}
			if !late {
				limits.CPUs = share
			}
			g := create(t, s, limits)
			began := time.Now()
			child := run(t, g, spinRole, "2s")
			if late {
				if err := g.SetCPUs(share, child.PID()); err != nil {
					t.Fatal(err)
				}
			}
			<-child.Done()
			// It may have had a period before it was bounded.
			took := time.Since(began)
			if used, most := child.CPUTime(), time.Duration(share*float64(took))+300*time.Millisecond; used > most {
				t.Errorf("in %s it had %s of a processor, want at most %s", took, used, most)
			}
			if !g.Has(CPU) {
				t.Error("the group has no limit of processor time")
			}
		})
	}
}

func TestSweep(t *testing.T) {
	g := create(t, realSite(t, Memory), Limits{MemoryBytes: 1 << 30})
	if err := Sweep("/", time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(g.Path()); err != nil {
		t.Errorf("a young group was removed: %v", err)
	}
	child := run(t, g, spinRole, "1h")
	if err := Sweep("/", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(g.Path()); err != nil {
		t.Errorf("a group with a process was removed: %v", err)
	}
	if err := child.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(); err != nil { // an ending thread may hold it for a moment
		t.Fatal(err)
	}
	g = create(t, realSite(t, Memory), Limits{MemoryBytes: 1 << 30})
	if err := Sweep("/", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(g.Path()); err == nil {
		t.Error("an empty group is left")
	}
}

func BenchmarkCreate(b *testing.B) {
	s := Find("/")
	if s.Why(Memory) != nil {
		b.Skip(s.Why(Memory))
	}
	runtime.LockOSThread() // whose groups change
	defer runtime.UnlockOSThread()
	for i := 0; b.Loop(); i++ {
		g, err := Find("/").Create(fmt.Sprintf("bench-%d-%d", os.Getpid(), i), Limits{MemoryBytes: 1 << 30, Tasks: 100})
		if err != nil {
			b.Fatal(err)
		}
		if err := g.fork(func() error { return nil }); err != nil {
			b.Fatal(err)
		}
		if err := g.Remove(); err != nil {
			b.Fatal(err)
		}
	}
}
