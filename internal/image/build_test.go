package image_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/testenv"
)

// childEnv makes the test's program another process that builds an image; its value
// is a childJob.
const childEnv = "SMOLVM_IMAGE_TEST_CHILD"

type childJob struct {
	Dir, Name, Agent, Kernel, Rootfs string
	// HangAt is the phase at which to say so, and go no further.
	HangAt string
}

// childResult is what the other process has to say, as a line of JSON.
type childResult struct {
	Phases []string
	Image  smolvm.Image
	Error  string
}

func TestMain(m *testing.M) {
	if job := os.Getenv(childEnv); job != "" {
		child(job)
		return
	}
	os.Exit(m.Run())
}

func child(text string) {
	var job childJob
	var result childResult
	err := json.Unmarshal([]byte(text), &job)
	if err == nil {
		// All children begin at the same time: when their input ends.
		_, _ = io.Copy(io.Discard, os.Stdin)
		result.Image, err = buildInChild(job, &result)
	}
	if err != nil {
		result.Error = err.Error()
	}
	_ = json.NewEncoder(os.Stdout).Encode(result)
}

func buildInChild(job childJob, result *childResult) (smolvm.Image, error) {
	store, err := image.Open(job.Dir)
	if err != nil {
		return smolvm.Image{}, err
	}
	return store.Ensure(context.Background(), image.Recipe{
		Name: job.Name, Agent: job.Agent, Kernel: job.Kernel, Rootfs: job.Rootfs,
		Progress: func(p smolvm.Progress) {
			result.Phases = append(result.Phases, p.Phase)
			if p.Phase == job.HangAt {
				fmt.Println("hanging")
				select {} // until killed
			}
		},
	})
}

// executable is the test's own program.
func executable(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// startChild starts another process. It begins when its input is closed.
func startChild(t *testing.T, program string, job childJob, attr *syscall.SysProcAttr) (cmd *exec.Cmd, begin io.Closer, out io.Reader) {
	t.Helper()
	text, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command(program)
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd, stdin, stdout
}

func childDone(t *testing.T, out io.Reader) childResult {
	t.Helper()
	var result childResult
	if err := json.NewDecoder(out).Decode(&result); err != nil {
		t.Fatal(err)
	}
	if result.Error != "" {
		t.Fatal(result.Error)
	}
	return result
}

func jobOf(dir string, recipe image.Recipe) childJob {
	return childJob{Dir: dir, Name: recipe.Name, Agent: recipe.Agent, Kernel: recipe.Kernel, Rootfs: recipe.Rootfs}
}

func TestTwoProcessesBuildOnce(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	job := jobOf(filepath.Join(work, "store"), smallRecipe(t, work))
	_, begin1, out1 := startChild(t, executable(t), job, nil)
	_, begin2, out2 := startChild(t, executable(t), job, nil)
	if err := errors.Join(begin1.Close(), begin2.Close()); err != nil {
		t.Fatal(err)
	}
	first, second := childDone(t, out1), childDone(t, out2)
	if first.Image.Digest != second.Image.Digest || first.Image.Digest == "" {
		t.Errorf("two images: %s and %s", first.Image.Digest, second.Image.Digest)
	}
	if (len(first.Phases) == 0) == (len(second.Phases) == 0) {
		t.Errorf("one should have built, and one waited: %q, %q", first.Phases, second.Phases)
	}
}

func TestKilledBuild(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	recipe := smallRecipe(t, work)
	dir := filepath.Join(work, "store")
	job := jobOf(dir, recipe)
	job.HangAt = "make root file system"
	cmd, begin, out := startChild(t, executable(t), job, nil)
	if err := begin.Close(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "hanging\n" {
		t.Fatalf("child says %q (%v)", line, err)
	}

	store := open(t, dir)
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	leftovers := func() []string {
		t.Helper()
		left, err := filepath.Glob(filepath.Join(dir, ".build-*"))
		if err != nil {
			t.Fatal(err)
		}
		return left
	}
	// A build under way is left alone, by those who would clean up as well.
	if _, err := store.Prune(canceled, func(smolvm.Image) (bool, error) { return false, nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("Prune during a build: error is %v", err)
	}
	if _, err := store.Build(canceled, recipe); !errors.Is(err, context.Canceled) {
		t.Errorf("second Build: error is %v", err)
	}
	if len(leftovers()) != 1 {
		t.Errorf("the build's files are %q", leftovers())
	}

	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if images := list(t, store); len(images) != 0 {
		t.Errorf("half an image is listed: %+v", images)
	}
	if _, err := store.Get(context.Background(), "small"); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("Get: error is %v", err)
	}
	build(t, store, recipe)
	if len(leftovers()) != 0 {
		t.Errorf("left behind: %q", leftovers())
	}
}

func TestBuildCanceled(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	recipe := smallRecipe(t, work)
	store := open(t, filepath.Join(work, "store"))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	recipe.Progress = func(p smolvm.Progress) {
		if p.Phase == "make root file system" {
			cancel()
		}
	}
	if _, err := store.Build(ctx, recipe); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(work, "store", ".build-*")); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}

// Ensure builds when something has changed, and only then.
func TestEnsure(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	recipe := smallRecipe(t, work)
	store := open(t, filepath.Join(work, "store"))
	ensure := func() (digest string, built bool) {
		t.Helper()
		recipe.Progress = func(smolvm.Progress) { built = true }
		got, err := store.Ensure(context.Background(), recipe)
		if err != nil {
			t.Fatal(err)
		}
		return got.Digest, built
	}
	first, built := ensure()
	if !built {
		t.Error("the first is not built")
	}
	inRootfs := filepath.Join(recipe.Rootfs, "etc/issue")
	changes := []struct {
		name         string
		change       func() error
		built, other bool
	}{
		{name: "nothing", change: func() error { return nil }},
		{name: "agent touched", change: func() error { return os.Chtimes(recipe.Agent, time.Unix(1, 0), time.Unix(1, 0)) }},
		{name: "kernel touched", change: func() error { return os.Chtimes(recipe.Kernel, time.Unix(1, 0), time.Unix(1, 0)) }, built: true},
		{name: "file in rootfs touched", change: func() error { return os.Chtimes(inRootfs, time.Unix(1, 0), time.Unix(1, 0)) }, built: true},
		{name: "agent changed", change: func() error { return os.WriteFile(recipe.Agent, []byte("x"), 0o644) }, built: true, other: true},
		{name: "file in rootfs changed", change: func() error { return os.WriteFile(inRootfs, []byte("x"), 0o644) }, built: true, other: true},
		{name: "its mode changed", change: func() error { return os.Chmod(inRootfs, 0o600) }, built: true, other: true},
	}
	for _, c := range changes {
		if err := c.change(); err != nil {
			t.Fatal(err)
		}
		digest, built := ensure()
		if built != c.built || (digest != first) != c.other {
			t.Errorf("%s: built is %t, another image is %t", c.name, built, digest != first)
		}
		first = digest
	}
	recipe.Force = true
	forced := build(t, store, recipe)
	if forced.Digest != first {
		t.Error("the same ingredients make another image")
	}
}

func TestRecipeRefused(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	good := smallRecipe(t, work)
	text := put(t, filepath.Join(work, "text"), "hello")
	overlay := put(t, filepath.Join(work, "overlay"), "QFI\xfb\x00\x00\x00\x03"+
		"\x00\x00\x00\x00\x00\x00\x00\x68\x00\x00\x00\x05"+strings.Repeat("\x00", 0x68-20)+"/base")
	tests := map[string]struct {
		change func(*image.Recipe)
		want   string
	}{
		"no name":             {func(r *image.Recipe) { r.Name = "" }, `name "" of an image`},
		"name":                {func(r *image.Recipe) { r.Name = "../x" }, `name "../x" of an image`},
		"no agent":            {func(r *image.Recipe) { r.Agent = "" }, "agent"},
		"agent":               {func(r *image.Recipe) { r.Agent = "/no/agent" }, "/no/agent"},
		"kernel":              {func(r *image.Recipe) { r.Kernel = "/no/kernel" }, "/no/kernel"},
		"kernel is text":      {func(r *image.Recipe) { r.Kernel = text }, text + ": is not a Linux kernel"},
		"kernel is a program": {func(r *image.Recipe) { r.Kernel = "/bin/ls" }, "/bin/ls: is a program, not a kernel"}, // case 29
		"before all else": {func(r *image.Recipe) {
			r.Kernel, r.Rootfs = "", text
			r.Progress = func(p smolvm.Progress) { t.Errorf("it begins to %s", p.Phase) }
		}, "holds no file system"},
		"modules, no kernel":    {func(r *image.Recipe) { r.ModulesDir, r.Kernel = work, "" }, "give both"},
		"root file system":      {func(r *image.Recipe) { r.Rootfs = "/no/rootfs" }, "/no/rootfs"},
		"rootfs is text":        {func(r *image.Recipe) { r.Rootfs = text }, "holds no file system"},
		"rootfs needs another":  {func(r *image.Recipe) { r.Rootfs = overlay }, "looks like qcow2"},
		"rootfs is no disk":     {func(r *image.Recipe) { r.Rootfs = "/dev/null" }, "character device"},
		"modules are of two":    {func(r *image.Recipe) { r.ModulesDir = twoKernels(t) }, "several kernels"},
		"modules are a missing": {func(r *image.Recipe) { r.ModulesDir = "/no/modules" }, "/no/modules"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "store")
			recipe := good
			test.change(&recipe)
			store := open(t, dir)
			if _, err := store.Build(context.Background(), recipe); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, ".build-*")); len(left) != 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

func twoKernels(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	put(t, filepath.Join(dir, "6.1/modules.builtin"), "kernel/a.ko\n")
	put(t, filepath.Join(dir, "6.2/modules.builtin"), "kernel/a.ko\n")
	return dir
}

// A tree may have more files than are usual for its size.
func TestManySmallFiles(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	recipe := smallRecipe(t, work)
	for i := range 9000 {
		put(t, filepath.Join(recipe.Rootfs, "many", fmt.Sprint(i%90), fmt.Sprint(i)), "")
	}
	built := build(t, open(t, filepath.Join(work, "store")), recipe)
	small := filepath.Join(filepath.Dir(built.RootfsPath), "rootfs-small")
	for _, path := range []string{built.RootfsPath, small} {
		run(t, "e2fsck", "-fn", path)
		if got := run(t, "debugfs", "-R", "stat /many/89/8999", path); !strings.Contains(got, "Type: regular") {
			t.Errorf("the last file: %s", got)
		}
	}
}

// From files alone, nothing of Debian or Ubuntu is needed.
func TestBuildWithoutApt(t *testing.T) {
	work := t.TempDir()
	recipe := smallRecipe(t, work)
	bin := filepath.Join(work, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"mke2fs", "debugfs"} {
		if err := os.Symlink(tool(name), filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin)
	store := open(t, filepath.Join(work, "store"))
	fromDir := build(t, store, recipe)
	if got := run(t, "debugfs", "-R", "cat /etc/issue", fromDir.RootfsPath); got != "welcome\n" {
		t.Errorf("/etc/issue is %q", got)
	}

	recipe.Name, recipe.Rootfs = "copy", fromDir.RootfsPath
	copied := build(t, store, recipe)
	if got := run(t, "debugfs", "-R", "cat /etc/issue", copied.RootfsPath); got != "welcome\n" {
		t.Errorf("in a copy, /etc/issue is %q", got)
	}
	if images := list(t, store); len(images) != 2 || images[1].Size > 8<<20 {
		t.Errorf("List = %+v", images)
	}

	recipe.Name, recipe.Kernel, recipe.Rootfs = "packages", "", ""
	if _, err := store.Build(context.Background(), recipe); err == nil || !strings.Contains(smolvm.HintOf(err), "--kernel") {
		t.Errorf("without apt: error is %v", err)
	}
}

// The whole way, as it goes on a user's first start; the packages come from a mirror.
func TestDefaultImage(t *testing.T) {
	needTools(t, "e2fsck", "dumpe2fs", "debugfs")
	base := testenv.Image(t)
	run(t, "e2fsck", "-fn", base.RootfsPath)
	var stat unix.Stat_t
	if err := unix.Stat(base.RootfsPath, &stat); err != nil {
		t.Fatal(err)
	}
	if used := stat.Blocks * 512; stat.Size != 8<<30 || used > 32<<20 {
		t.Errorf("root file system has %d bytes, and takes %d", stat.Size, used)
	}
	// The guest's kernel must not write zeros over it, and must be able to grow it.
	groups := run(t, "dumpe2fs", base.RootfsPath)
	if strings.Count(groups, "ITABLE_ZEROED") != strings.Count(groups, " (Blocks ") {
		t.Error("the guest's kernel would clear inode tables")
	}
	for _, feature := range []string{"64bit", "resize_inode", "metadata_csum", "has_journal"} {
		if !strings.Contains(groups, " "+feature) {
			t.Errorf("file system lacks %s", feature)
		}
	}
	checkOwners(t, base.RootfsPath)
	checkInitramfs(t, base.InitrdPath)
	if head := make([]byte, 4); readAt(t, base.KernelPath, head) != nil || string(head) != "\x7fELF" {
		t.Errorf("kernel begins with %q", head)
	}
	if strings.Contains(run(t, "debugfs", "-R", "cat /etc/shadow", base.RootfsPath), "$") {
		t.Error("there is a password in the image")
	}
}

func readAt(t *testing.T, path string, b []byte) error {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.ReadAt(b, 0)
	return errors.Join(err, file.Close())
}

// checkOwners checks owners and modes of the default image, as debugfs lists them:
// "/inode/mode/uid/gid/name/size/".
func checkOwners(t *testing.T, rootfs string) {
	t.Helper()
	want := map[string]string{
		"/bin/busybox": "100755/0/0", "/bin/sh": "120777/0/0", "/etc/passwd": "100644/0/0", "/etc/shadow": "100600/0/0",
		"/home": "40755/0/0", "/home/user": "40755/1000/1000", "/root": "40700/0/0", "/tmp": "41777/0/0", "/usr": "40755/0/0",
		"/usr/local/bin": "40755/0/0", "/var/tmp": "41777/0/0", "/proc": "40555/0/0", "/lost+found": "40700/0/0",
	}
	got := map[string]string{}
	for _, dir := range []string{"/", "/bin", "/etc", "/home", "/usr", "/usr/local", "/var", "/usr/bin", "/sbin"} {
		for line := range strings.Lines(run(t, "debugfs", "-R", "ls -p "+dir, rootfs)) {
			fields := strings.Split(line, "/")
			if len(fields) < 6 || fields[5] == "." || fields[5] == ".." {
				continue
			}
			path := filepath.Join(dir, fields[5])
			got[path] = strings.TrimLeft(fields[2], "0") + "/" + fields[3] + "/" + fields[4]
			if path != "/home/user" && !strings.HasSuffix(got[path], "/0/0") {
				t.Errorf("%s is %s, not root's", path, got[path])
			}
		}
	}
	for path, want := range want {
		if got[path] != want {
			t.Errorf("%s is %s, want %s", path, got[path], want)
		}
	}
}

func checkInitramfs(t *testing.T, path string) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Each of these is a name, which is followed by a zero byte.
	names := []string{"init", "dev/console", "dev/null", "proc", "sys", "newroot", strings.TrimPrefix(wire.ModulesManifest, "/")}
	for _, module := range []string{"virtio", "virtio_ring", "virtio_mmio", "virtio_pci", "virtio_blk", "virtio_console", "virtio_net"} {
		if bytes.Contains(content, []byte("/lib/smolvm/")) { // not all is built in
			names = append(names, "lib/smolvm/"+module+".ko")
		}
	}
	for _, name := range names {
		if !bytes.Contains(content, []byte(name+"\x00")) {
			t.Errorf("initramfs lacks %s", name)
		}
	}
}

// Root is not needed, a strict umask does no harm, and all is root's nevertheless.
func TestBuildAsAnotherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	if testing.Short() {
		t.Skip("it fetches a package")
	}
	base := testenv.Image(t) // skips where there are no packages
	work := t.TempDir()
	recipe := smallRecipe(t, work)
	const nobody = 65534
	dir := filepath.Join(work, "store")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, nobody, nobody)); err != nil {
		t.Fatal(err)
	}
	kernel, err := os.ReadFile(base.KernelPath)
	if err != nil {
		t.Fatal(err)
	}
	recipe.Kernel, recipe.Rootfs = put(t, recipe.Kernel, string(kernel)), ""
	// A copy of this program, as other users can't read the directory of it.
	program := filepath.Join(work, "child")
	self, err := os.ReadFile(executable(t))
	if err == nil {
		err = errors.Join(os.WriteFile(program, self, 0o755), os.Chmod(filepath.Dir(work), 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	_, begin, out := startChild(t, program, jobOf(dir, recipe), &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}})
	if err := begin.Close(); err != nil {
		t.Fatal(err)
	}
	built := childDone(t, out).Image
	run(t, "e2fsck", "-fn", built.RootfsPath)
	checkOwners(t, built.RootfsPath)
}

// An agent that is at another place than before, as after the data directory was moved, is
// hashed once, not with each VM that is made.
func TestEnsureRemembersAgent(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	recipe := smallRecipe(t, work)
	store := open(t, filepath.Join(work, "store"))
	ensure := func() string {
		t.Helper()
		if _, err := store.Ensure(t.Context(), recipe); err != nil {
			t.Fatal(err)
		}
		record, err := os.ReadFile(filepath.Join(work, "store", "names", recipe.Name))
		if err != nil {
			t.Fatal(err)
		}
		return string(record)
	}
	ensure()
	agent, err := os.ReadFile(recipe.Agent)
	if err != nil {
		t.Fatal(err)
	}
	recipe.Agent = filepath.Join(work, "elsewhere")
	if err := os.WriteFile(recipe.Agent, agent, 0o755); err != nil {
		t.Fatal(err)
	}
	recipe.Progress = func(smolvm.Progress) { t.Error("the image was built again") }
	// A program that another test is just starting may hold the store's lock for a moment: then
	// it is written down at a later time.
	for !strings.Contains(ensure(), recipe.Agent) { // the test's time bounds it
		time.Sleep(10 * time.Millisecond)
	}
}
