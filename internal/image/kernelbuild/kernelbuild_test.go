package kernelbuild_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/deb/debtest"
	"github.com/smolvm/smolvm/internal/image/distro"
	"github.com/smolvm/smolvm/internal/image/imagetest"
	"github.com/smolvm/smolvm/internal/image/kernelbuild"
	"github.com/smolvm/smolvm/internal/step"
)

// helperEnv has the directories of a build that the test binary does as a program.
const helperEnv = "SMOLVM_TEST_KERNELBUILD"

func TestMain(m *testing.M) {
	if dirs := os.Getenv(helperEnv); dirs != "" {
		_, err := newStore(dirs).Build(context.Background(), smolvm.KernelOptions{})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// newStore returns a store whose packages are kept beside its kernels.
func newStore(dir string) *kernelbuild.Store {
	return &kernelbuild.Store{Dir: filepath.Join(dir, "kernels"), Open: func(ctx context.Context) (kernelbuild.Packages, func(), error) {
		packages := filepath.Join(dir, "packages")
		unlock, err := distro.Builder{Dir: packages}.Lock(ctx)
		if err != nil {
			return nil, nil, err
		}
		source, err := distro.OpenSource(packages, distro.Release{ID: "debian", Codename: "test", Arch: runtime.GOARCH})
		if err != nil {
			unlock()
			return nil, nil, err
		}
		return source, unlock, nil
	}}
}

// fake is a distribution with a source that is made quickly to a kernel, on a host with all that it
// takes. What its make does is noted in files.
type fake struct {
	*debtest.Mirror

	dir string
}

// makefile is that of the source. It has what is asked for of it by the builder, and waits for nobody
// unless there is a file "hold": then it tells its process, and waits for its end.
const makefile = `tinyconfig:
	echo tinyconfig >> NOTES/done
	echo '# CONFIG_SMP is not set' > .config
olddefconfig:
	test -e merged
	if test -e NOTES/break; then sed -i /CONFIG_OVERLAY_FS/d .config; fi
vmlinux:
	@if test -e NOTES/fail; then echo 'main.c:1: this is wrong' >&2; exit 1; fi
	@if test -e NOTES/hold; then echo $$$$ > NOTES/held; exec sleep 1000; fi
	echo '  CC      main.o'
	echo vmlinux >> NOTES/done
	cp kernel.elf vmlinux
`

// merge is the source's program that merges configurations.
const merge = "test \"$1 $2\" = '-m .config' && cat \"$3\" >> \"$2\" && touch merged\n"

func newFake(t *testing.T) *fake {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("there is a configuration for amd64 only")
	}
	for _, program := range []string{"make", "tar", "xz"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	f := &fake{dir: t.TempDir()}
	tools := filepath.Join(f.dir, "tools")
	if err := os.Mkdir(tools, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, script := range map[string]string{
		"gcc": "echo gcc 1.0", "ld": "echo ld 1.0", "flex": "", "bison": "", "bc": "", "strip": `cp "$4" "$3"`,
	} {
		if err := os.WriteFile(filepath.Join(tools, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
	f.Mirror = debtest.NewMirror(t, "[trusted=yes]",
		f.pkg(t, "linux-source", "1.0-1", "linux-source-6.1 (= 1.0-1)"), f.pkg(t, "linux-source-6.1", "1.0-1", ""), f.pkg(t, "linux-source-6.12", "1.0-1", ""))
	if err := unix.Mkfifo(f.note("held"), 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fake) note(name string) string { return filepath.Join(f.dir, name) }

// set makes a note, or removes it.
func (f *fake) set(t *testing.T, name string, there bool) {
	t.Helper()
	err := os.Remove(f.note(name))
	if there {
		err = os.WriteFile(f.note(name), nil, 0o600)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

// done returns how often make has made something.
func (f *fake) done(what string) int {
	text, _ := os.ReadFile(f.note("done"))
	return strings.Count(string(text), what+"\n")
}

// pkg returns a package with a source, or one that depends on such.
func (f *fake) pkg(t *testing.T, name, version, depends string) debtest.Deb {
	t.Helper()
	fields := "Priority: optional\n"
	if depends != "" {
		fields += "Depends: " + depends + "\n"
	}
	control := strings.Replace(debtest.Control(name, fields), "1.0-1", version, 1)
	p := debtest.Package{Name: name, Control: control, Entries: []debtest.Entry{debtest.Dir("./")}}
	if depends == "" {
		source := debtest.Tar(t, []debtest.Entry{
			debtest.Dir(name + "/"), debtest.File(name+"/Makefile", strings.ReplaceAll(makefile, "NOTES", f.dir)),
			debtest.Dir(name + "/scripts/kconfig"), debtest.File(name+"/scripts/kconfig/merge_config.sh", merge),
			debtest.File(name+"/kernel.elf", string(imagetest.TinyKernel())),
		})
		cmd := exec.CommandContext(t.Context(), "xz", "--stdout")
		cmd.Stdin = bytes.NewReader(source)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		p.Entries = append(p.Entries, debtest.File("./usr/share/doc/"+name+"/copyright", "free"), debtest.File("./usr/src/"+name+".tar.xz", string(packed)))
	}
	return p.Deb(t)
}

func mustBuild(t *testing.T, s *kernelbuild.Store, opts smolvm.KernelOptions) smolvm.Kernel {
	t.Helper()
	k, err := s.Build(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestBuild(t *testing.T) {
	f := newFake(t)
	s := newStore(t.TempDir())
	if k, ok, err := s.Used(); ok || err != nil {
		t.Fatalf("of none, %+v is used, %v", k, err)
	}
	var phases []string
	first := mustBuild(t, s, smolvm.KernelOptions{Progress: func(p smolvm.Progress) { phases = append(phases, p.Phase) }})
	if !first.Used || first.Package != "linux-source-6.1" || first.Version != "1.0-1" || !strings.HasPrefix(first.Name, "linux-source-6.1 1.0-1 smolvm-") {
		t.Errorf("it is %+v", first)
	}
	for _, want := range []string{"fetch package lists", "download linux-source-6.1 1.0-1", "unpack linux-source-6.1 1.0-1", "compile linux-source-6.1 1.0-1"} {
		if !strings.Contains(strings.Join(phases, "\n"), want) {
			t.Errorf("progress lacks %q: %q", want, phases)
		}
	}
	if got, err := os.ReadFile(first.Path); err != nil || !bytes.Equal(got, imagetest.TinyKernel()) {
		t.Errorf("the kernel is not what make has made: %v", err)
	}
	if got, err := os.ReadFile(first.ConfigPath); err != nil || !strings.Contains(string(got), "CONFIG_VMGENID=y\n") {
		t.Errorf("the configuration is not kept: %v", err)
	}
	if got, err := os.ReadFile(first.SourcePath); err != nil || !bytes.Equal(got, f.Files["pool/linux-source-6.1.deb"]) {
		t.Errorf("the source is not kept: %v", err)
	}
	if left, err := os.ReadDir(s.Dir); err != nil || len(left) != 4 { // the kernel, used.json, the log, the lock
		t.Errorf("there are %v, %v", left, err)
	}

	again := mustBuild(t, s, smolvm.KernelOptions{})
	if again != first || f.done("vmlinux") != 1 {
		t.Errorf("the second time it is %+v, and %d were made", again, f.done("vmlinux"))
	}
	forced := mustBuild(t, s, smolvm.KernelOptions{Force: true})
	if forced.Path != first.Path || f.done("vmlinux") != 2 {
		t.Errorf("by force it is %+v, and %d were made", forced, f.done("vmlinux"))
	}

	other := mustBuild(t, s, smolvm.KernelOptions{Version: "6.12", Unused: true, Jobs: 1})
	if other.Used || other.Package != "linux-source-6.12" || f.done("vmlinux") != 3 {
		t.Errorf("another version is %+v", other)
	}
	if used, ok, err := s.Used(); err != nil || !ok || used != forced {
		t.Errorf("%+v is used, %v", used, err)
	}
	_, err := s.Build(t.Context(), smolvm.KernelOptions{Version: "5.10"})
	if err == nil || !strings.Contains(err.Error(), "source of kernel 5.10") || smolvm.HintOf(err) != "there is --version 6.1, --version 6.12" {
		t.Errorf("of a version that there is not: %v, with the hint %q", err, smolvm.HintOf(err))
	}
	if err := s.Prune(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(other.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a kernel that nobody uses is kept: %v", err)
	}
	if used, ok, err := s.Used(); err != nil || !ok || used != forced {
		t.Errorf("after pruning, %+v is used, %v", used, err)
	}

	if err := os.Remove(forced.Path); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Used(); err == nil || !strings.Contains(smolvm.HintOf(err), "--reset") {
		t.Errorf("of a kernel that is damaged: %v", err)
	}
	if err := errors.Join(s.Reset(), s.Reset()); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := s.Used(); ok || err != nil {
		t.Errorf("after a reset one is used: %v", err)
	}
}

// A newer source makes another kernel, and images boot with that.
func TestBuildNewer(t *testing.T) {
	f := newFake(t)
	dir := t.TempDir()
	first := mustBuild(t, newStore(dir), smolvm.KernelOptions{})
	debtest.NewMirror(t, "[trusted=yes]", f.pkg(t, "linux-source", "1.0-2", "linux-source-6.1 (= 1.0-2)"), f.pkg(t, "linux-source-6.1", "1.0-2", ""))
	second := mustBuild(t, newStore(dir), smolvm.KernelOptions{})
	if second.Version != "1.0-2" || second.Path == first.Path || !second.Used {
		t.Errorf("it is %+v", second)
	}
}

func TestBuildSaysWhatIsWrong(t *testing.T) {
	f := newFake(t)
	s := newStore(t.TempDir())
	for _, test := range []struct {
		note, want, hint string
		options          smolvm.KernelOptions
	}{
		{note: "break", want: "CONFIG_OVERLAY_FS=y (there is no such option", hint: "--version"},
		{note: "fail", want: "main.c:1: this is wrong", hint: filepath.Join(s.Dir, "build.log")},
		{options: smolvm.KernelOptions{Version: "six"}, want: `version "six"`},
	} {
		if test.note != "" {
			f.set(t, test.note, true)
		}
		_, err := s.Build(t.Context(), test.options)
		if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(smolvm.HintOf(err), test.hint) {
			t.Errorf("of %q: %v, with the hint %q", test.want, err, smolvm.HintOf(err))
		}
		if _, err := os.Stat(filepath.Join(s.Dir, "build")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("of %q the tree is left: %v", test.want, err)
		}
		if test.note != "" {
			f.set(t, test.note, false)
		}
	}
	mustBuild(t, s, smolvm.KernelOptions{})
	if _, err := newStore(filepath.Join(t.TempDir(), "a b")).Build(t.Context(), smolvm.KernelOptions{}); err == nil || !strings.Contains(err.Error(), "blanks or colons") {
		t.Errorf("of a directory that make refuses: %v", err)
	}
}

// All that a host lacks is told at once, before anything is fetched.
func TestToolsThatAreMissing(t *testing.T) {
	newFake(t)
	s := newStore(t.TempDir())
	t.Setenv("PATH", t.TempDir())
	_, err := s.Build(t.Context(), smolvm.KernelOptions{})
	if err == nil || !strings.Contains(err.Error(), "gcc, make, flex, bison, bc, tar, xz") || !strings.Contains(err.Error(), "libelf") {
		t.Errorf("the error is %v", err)
	}
	if hint := smolvm.HintOf(err); hint != "sudo apt-get install gcc make flex bison bc tar xz-utils binutils libc6-dev libelf-dev" {
		t.Errorf("the hint is %q", hint)
	}
	if _, err := os.Stat(s.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was made: %v", err)
	}
}

// held returns the process that make has started, once it has.
func (f *fake) held(t *testing.T) int {
	t.Helper()
	file, err := os.Open(f.note("held")) // waits for its writer
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	line, err := bufio.NewReader(file).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(line, &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

// A build that is called off ends all that it has started, and goes on the next time.
func TestInterrupted(t *testing.T) {
	f := newFake(t)
	s := newStore(t.TempDir())
	f.set(t, "hold", true)
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("enough")
	result := make(chan error, 1)
	go func() {
		_, err := s.Build(ctx, smolvm.KernelOptions{})
		result <- err
	}()
	pid := f.held(t)
	if err := s.Prune(); err != nil { // leaves it alone
		t.Error(err)
	}
	cancel(stop)
	if err := <-result; !errors.Is(err, stop) {
		t.Errorf("the error is %v", err)
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) && !isZombie(pid) {
		t.Errorf("a process of it goes on: %v", err)
	}
	f.set(t, "hold", false)
	mustBuild(t, s, smolvm.KernelOptions{})
	if got := f.done("tinyconfig"); got != 1 {
		t.Errorf("it was begun anew: configured %d times", got)
	}
}

func isZombie(pid int) bool {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return strings.Contains(string(text), ") Z ")
}

// helper returns a program that builds.
func helper(t *testing.T, dir string, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(append(os.Environ(), helperEnv+"="+dir), env...)
	return cmd
}

// A program that is killed while it compiles leaves nobody behind who would disturb the next one.
func TestKilledWhileCompiling(t *testing.T) {
	f := newFake(t)
	dir := t.TempDir()
	f.set(t, "hold", true)
	cmd := helper(t, dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.held(t)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	f.set(t, "hold", false)
	mustBuild(t, newStore(dir), smolvm.KernelOptions{}) // waits until those that the other has started have ended
	if got := f.done("tinyconfig"); got != 1 {
		t.Errorf("it was begun anew: configured %d times", got)
	}
}

// A program that is killed at any step leaves what the next one goes on with, and no half kernel.
func TestKilledAtEachStep(t *testing.T) {
	f := newFake(t)
	trace := filepath.Join(f.dir, "steps")
	if out, err := helper(t, t.TempDir(), step.TraceEnv+"="+trace).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	steps := strings.Fields(strings.ReplaceAll(string(text), "image kernel/", ""))
	if len(steps) < 6 {
		t.Errorf("it comes to %q only", steps)
	}
	for _, point := range steps {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			if err := helper(t, dir, step.CrashEnv+"=image kernel/"+point).Run(); err == nil {
				t.Fatal("it was not killed")
			}
			s := newStore(dir)
			if k, ok, err := s.Used(); err != nil || ok && k.Package == "" {
				t.Errorf("%+v is used, %v", k, err)
			}
			mustBuild(t, s, smolvm.KernelOptions{})
			if left, err := os.ReadDir(s.Dir); err != nil || len(left) != 4 {
				t.Errorf("there are %v, %v", left, err)
			}
		})
	}
}

// Of several who want the same kernel one does the work.
func TestBuildAtOnce(t *testing.T) {
	f := newFake(t)
	dir := t.TempDir()
	var wait sync.WaitGroup
	for range 4 {
		wait.Go(func() {
			if _, err := newStore(dir).Build(t.Context(), smolvm.KernelOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	if got := f.done("vmlinux"); got != 1 {
		t.Errorf("%d were made", got)
	}
}

var _ kernelbuild.Packages = (*distro.Source)(nil)
