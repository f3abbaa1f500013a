package manager_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// check keeps the examples short; a program handles its errors.
func check(err error) {
	if err != nil {
		panic(err)
	}
}

func Example() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	vm, err := m.Create(ctx, smolvm.VMConfig{ID: "hello"}, smolvm.CreateOptions{})
	check(err)
	_, err = m.Start(ctx, vm.ID, smolvm.StartOptions{})
	check(err)
	status, err := m.Exec(ctx, vm.ID, smolvm.Command{
		Args:   []string{"uname", "-sm"},
		Stdout: os.Stdout,
	})
	check(err)
	fmt.Println(status)
	check(m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}))
}

// With default directories, or with paths of one's own.
func ExampleOpen() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	check(m.Close())

	dir, err := os.MkdirTemp("", "smolvm")
	check(err)
	defer func() { _ = os.RemoveAll(dir) }()
	m, err = manager.Open(ctx, manager.Config{
		DataDir:   filepath.Join(dir, "state"),
		SocketDir: filepath.Join(dir, "sockets"),
		Backend:   "qemu",
	})
	check(err)
	fmt.Println(m.Backend())
	check(m.Close())
}

// A kernel and an initramfs of one's own, booted as they are.
func ExampleManager_Create() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	vm, err := m.Create(ctx, smolvm.VMConfig{
		ID:         "test-vm",
		VCPUs:      2,
		MemoryMiB:  512,
		KernelPath: os.Getenv("KERNEL"),
		InitrdPath: os.Getenv("INITRD"),
		BootArgs:   "console=ttyS0 reboot=k panic=1 pci=off init=/init",
	}, smolvm.CreateOptions{})
	check(err)
	fmt.Println("created", vm.ID, "with IP", vm.Network.GuestIP)

	vm, err = m.Start(ctx, vm.ID, smolvm.StartOptions{Timeout: 30 * time.Second})
	check(err)
	fmt.Println("it is", vm.State)

	vm, err = m.Stop(ctx, vm.ID, smolvm.StopOptions{Timeout: time.Second})
	check(err)
	fmt.Println("it is", vm.State)
	check(m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}))
}

// A handle of a VM that another process has made.
func ExampleManager_VM() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	vm := m.VM("my-vm")
	info, err := vm.Info(ctx)
	check(err)
	out, err := vm.Output(ctx, "uname", "-s")
	check(err)
	fmt.Printf("%s, %s", info.State, out)
}

// One command in a VM of its own.
func ExampleManager_Run() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	result, err := m.Run(ctx, smolvm.VMConfig{}, smolvm.Command{Args: []string{"sh", "-c", "echo $((6 * 7)); exit 3"}})
	check(err)
	fmt.Printf("%s%s\n", result.Stdout, result)
}

func ExampleManager_List() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	running, err := m.List(ctx, smolvm.ListOptions{State: smolvm.StateRunning})
	check(err)
	for _, vm := range running {
		fmt.Println(vm.ID, vm.Network.GuestIP)
	}
}

func ExampleManager_Reconcile() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	dead, err := m.Reconcile(ctx)
	check(err)
	fmt.Println("found", len(dead), "VMs dead")
}

func ExampleManager_SSH() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	access, err := m.SSH(ctx, "my-vm", smolvm.SSHOptions{
		User:    "user",
		KeyPath: "~/.ssh/id_ed25519",
	})
	check(err)
	fmt.Println("there is a command:", access.String() != "")
}

func ExampleManager_CheckPrerequisites() {
	ctx := context.Background()
	m, err := manager.Open(ctx, manager.Config{})
	check(err)
	defer m.Close() //nolint:errcheck // an example

	findings, err := m.CheckPrerequisites(ctx, "")
	check(err)
	missing := 0
	for _, finding := range findings {
		if finding.Severity == smolvm.SeverityError {
			fmt.Println(finding)
			missing++
		}
	}
	fmt.Println("missing:", missing)
}

// Every example runs, on real VMs, as a program of its own would: with the defaults
// of the environment, and the smolvm program found in PATH.
func TestExamples(t *testing.T) {
	testenv.RequireQEMU(t)
	dir := tempDir(t)
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"smolvm": self, "smolvm-agent": testenv.Agent(t)} {
		if err := os.Symlink(target, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	data := filepath.Join(dir, "data")
	testenv.SeedImages(t, data)
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("SMOLVM_DATA_DIR", data)
	t.Setenv("SMOLVM_TEMPLATES", "off") // each example boots a VM or two
	t.Setenv("KERNEL", testenv.Kernel(t))
	t.Setenv("INITRD", testenv.Initramfs(t, "while :; do sleep 1; done\n"))

	m, err := manager.Open(t.Context(), manager.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	mustRun(t, m, smolvm.VMConfig{ID: "my-vm"})
	for _, example := range []struct {
		name string
		run  func()
		want string
	}{
		{"Example", Example, "Linux x86_64\nexit status 0\n"},
		{"Open", ExampleOpen, "qemu\n"},
		{"Create", ExampleManager_Create, "created test-vm with IP 10.0.2.15\nit is running\nit is stopped\n"},
		{"VM", ExampleManager_VM, "running, Linux\n"},
		{"Run", ExampleManager_Run, "42\nexit status 3\n"},
		{"List", ExampleManager_List, "my-vm 10.0.2.15\n"},
		{"Reconcile", ExampleManager_Reconcile, "found 0 VMs dead\n"},
		{"SSH", ExampleManager_SSH, "there is a command: true\n"},
		{"CheckPrerequisites", ExampleManager_CheckPrerequisites, "missing: 0\n"},
		{"Fork", ExampleManager_Fork, "1000\n1000\n"},
		{"CreateSnapshot", ExampleManager_CreateSnapshot, "loaded\ndb snapshot\n"},
		{"SetPool", ExampleManager_SetPool, "warm\npool\n"},
	} {
		t.Run(example.name, func(t *testing.T) {
			if example.name == "SetPool" {
				t.Setenv("SMOLVM_TEMPLATES", "")
			}
			if got := captureStdout(t, example.run); got != example.want {
				t.Errorf("printed %q, want %q", got, example.want)
			}
		})
	}
	if err := m.Delete(t.Context(), "my-vm", smolvm.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	if left := testenv.Processes(data); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, "\n"))
	}
}

// captureStdout returns what a function prints.
func captureStdout(t *testing.T, run func()) string {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout := os.Stdout
	os.Stdout = write
	printed := make(chan string, 1)
	go func() {
		var text bytes.Buffer
		_, _ = io.Copy(&text, read)
		printed <- text.String()
	}()
	defer func() { os.Stdout = stdout }()
	run()
	_ = write.Close()
	return <-printed
}
