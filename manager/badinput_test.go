package manager_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/imagetest"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm/vmmfake"
	"github.com/smolvm/smolvm/manager"
)

// Every verb on an id that no VM has, or can have.
func TestUnknownAndIllegalIDs(t *testing.T) {
	t.Parallel()
	m := openEmpty(t)
	ctx := t.Context()
	verbs := map[string]func(id string) error{
		"get":    func(id string) error { _, err := m.Get(ctx, id); return err },
		"start":  func(id string) error { _, err := m.Start(ctx, id, smolvm.StartOptions{}); return err },
		"stop":   func(id string) error { _, err := m.Stop(ctx, id, smolvm.StopOptions{}); return err },
		"delete": func(id string) error { return m.Delete(ctx, id, smolvm.DeleteOptions{}) },
		"exec": func(id string) error {
			_, err := m.Exec(ctx, id, smolvm.Command{Args: []string{"true"}})
			return err
		},
		"logs":  func(id string) error { _, err := m.Logs(ctx, id, smolvm.LogOptions{}); return err },
		"copy":  func(id string) error { return m.CopyTo(ctx, id, "/etc/hostname", "/tmp") },
		"dial":  func(id string) error { _, err := m.Dial(ctx, id, "tcp", "127.0.0.1:80"); return err },
		"ssh":   func(id string) error { _, err := m.SSH(ctx, id, smolvm.SSHOptions{}); return err },
		"ports": func(id string) error { _, err := m.PortForwards(ctx, id); return err },
		"port": func(id string) error {
			_, err := m.AddPortForward(ctx, id, smolvm.PortForward{GuestPort: 1})
			return err
		},
		"policy":      func(id string) error { _, err := m.Egress(ctx, id); return err },
		"set policy":  func(id string) error { _, err := m.SetEgress(ctx, id, smolvm.EgressPolicy{}); return err },
		"test policy": func(id string) error { _, err := m.TestEgress(ctx, id, "example.com"); return err },
		"unport":      func(id string) error { return m.RemovePortForward(ctx, id, smolvm.PortForward{HostPort: 1}) },
	}
	for name, verb := range verbs {
		t.Run(name, func(t *testing.T) {
			if err := verb("nobody"); !errors.Is(err, smolvm.ErrVMNotFound) || !strings.Contains(err.Error(), `"nobody"`) {
				t.Errorf("unknown id: %v", err)
			}
			for _, id := range []string{"", "UPPER", "../escape", "a b", "-a", strings.Repeat("a", 65)} {
				var invalid *smolvm.ValidationError
				err := verb(id)
				noVM := errors.Is(err, smolvm.ErrVMNotFound) || name == "copy" && id == "" // then it is of the host
				if !errors.As(err, &invalid) || !noVM {
					t.Errorf("id %q: %v", id, err)
				}
			}
		})
	}
	for _, dir := range []string{"locks", "vms", "disks"} {
		checkEmpty(t, filepath.Join(m.DataDir(), dir))
	}
}

// publicKey is a key that is fine by itself.
const publicKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDvd9sQY0Yb0nXxM1YVwHUkH8DsUq3cEhTmpbTzGkiMA somebody"

// Bad configurations are refused with every bad field named, and leave nothing.
func TestCreateBadConfig(t *testing.T) {
	t.Parallel()
	m := openEmpty(t)
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("not a kernel, nor a disk"), 0o600); err != nil {
		t.Fatal(err)
	}
	kernel := filepath.Join(dir, "kernel")
	if err := os.WriteFile(kernel, imagetest.TinyKernel(), 0o600); err != nil {
		t.Fatal(err)
	}
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, []byte(imagetest.Initramfs), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		config smolvm.VMConfig
		fields []string
	}{
		"id":             {smolvm.VMConfig{ID: "No Good"}, []string{"id"}},
		"too much":       {smolvm.VMConfig{VCPUs: 33, MemoryMiB: 16385}, []string{"vcpus", "memory_mib"}},
		"too little":     {smolvm.VMConfig{VCPUs: -1, MemoryMiB: 127}, []string{"vcpus", "memory_mib"}},
		"missing files":  {smolvm.VMConfig{KernelPath: dir + "/no", RootfsPath: dir + "/nor"}, []string{"kernel_path", "rootfs_path"}},
		"not a kernel":   {smolvm.VMConfig{KernelPath: text, InitrdPath: initrd}, []string{"kernel_path"}},
		"a program":      {smolvm.VMConfig{KernelPath: "/bin/sh", InitrdPath: initrd}, []string{"kernel_path"}},
		"no initramfs":   {smolvm.VMConfig{KernelPath: kernel, InitrdPath: text}, []string{"initrd_path"}},
		"no file system": {smolvm.VMConfig{KernelPath: kernel, RootfsPath: text}, []string{"rootfs_path"}},
		"directories":    {smolvm.VMConfig{KernelPath: kernel, InitrdPath: dir, RootfsPath: dir}, []string{"initrd_path", "rootfs_path"}},
		"drives":         {smolvm.VMConfig{KernelPath: kernel, InitrdPath: initrd, Drives: []smolvm.Drive{{Path: dir + "/no"}}}, []string{"drives[0].path"}},
		"backend":        {smolvm.VMConfig{Backend: "xen"}, []string{"backend"}},
		"both":           {smolvm.VMConfig{Image: "base", KernelPath: kernel, InitrdPath: initrd}, []string{"image"}},
		"keys": {smolvm.VMConfig{AuthorizedKeys: []string{"ssh-ed25519 nonsense", `command="id" ` + publicKey}},
			[]string{"authorized_keys[0]", "authorized_keys[1]"}},
		"ports": {smolvm.VMConfig{PortForwards: []smolvm.PortForward{{HostPort: 70000, GuestPort: 0}}},
			[]string{"port_forwards[0].host_port", "port_forwards[0].guest_port"}},
		"many": {smolvm.VMConfig{ID: "A", VCPUs: 99, DiskMode: "magic", Ready: "never", Env: map[string]string{"1": ""}, Backend: "xen"},
			[]string{"id", "vcpus", "backend", "ready", "disk_mode", "env"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := m.Create(t.Context(), test.config, smolvm.CreateOptions{})
			var invalid *smolvm.ValidationError
			if !errors.As(err, &invalid) {
				t.Fatalf("error is %v", err)
			}
			got := map[string]bool{}
			for _, field := range invalid.Fields {
				got[field.Field] = true
			}
			for _, want := range test.fields {
				if !got[want] {
					t.Errorf("field %s is not named: %v", want, err)
				}
			}
		})
	}
	if os.Getuid() != 0 {
		t.Run("unreadable", func(t *testing.T) {
			_ = os.Chmod(kernel, 0)
			if _, err := m.Create(t.Context(), smolvm.VMConfig{KernelPath: kernel, InitrdPath: initrd}, smolvm.CreateOptions{}); err == nil {
				t.Error("a kernel that can't be read is taken")
			}
		})
	}
	vms, err := m.List(t.Context(), smolvm.ListOptions{})
	if err != nil || len(vms) != 0 {
		t.Errorf("there are VMs: %v, %v", vms, err)
	}
	for _, dir := range []string{"disks", "vms", "locks"} {
		checkEmpty(t, filepath.Join(m.DataDir(), dir))
	}
}

func TestOpenBadDirectories(t *testing.T) {
	dir := tempDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	corrupt := filepath.Join(dir, "corrupt")
	if err := os.MkdirAll(corrupt, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(corrupt, "smolvm.db"), []byte(strings.Repeat("garbage ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ dataDir, want string }{
		"a file":     {file, "data directory from the DataDir option"},
		"below one":  {file + "/data", "not a directory"},
		"corrupt":    {corrupt, "corrupt"},
		"unwritable": {"/proc/smolvm", "data directory from the DataDir option"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := manager.Open(t.Context(), manager.Config{DataDir: test.dataDir})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
		})
	}
	if _, err := manager.Open(t.Context(), manager.Config{DataDir: corrupt}); !errors.Is(err, smolvm.ErrDatabaseCorrupt) {
		t.Errorf("a corrupt database: %v", err)
	}
	if _, err := manager.Open(t.Context(), manager.Config{DataDir: dir + "/data", Backend: "xen"}); err == nil || !strings.Contains(err.Error(), `"xen"`) {
		t.Errorf("an unknown backend: %v", err)
	}
}

func TestDataDirResolution(t *testing.T) {
	dir := tempDir(t)
	t.Setenv("XDG_STATE_HOME", filepath.Join(dir, "state"))
	open := func() string {
		t.Helper()
		m, err := manager.Open(t.Context(), manager.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = m.Close() }()
		if m.DiskDir() != filepath.Join(m.DataDir(), "disks") || m.Backend() != "qemu" || m.SocketDir() == "" {
			t.Errorf("disks in %s, backend %s, sockets in %s", m.DiskDir(), m.Backend(), m.SocketDir())
		}
		return m.DataDir()
	}
	t.Setenv("SMOLVM_DATA_DIR", "")
	if got, want := open(), filepath.Join(dir, "state", "smolvm"); got != want {
		t.Errorf("by the state directory: %s, want %s", got, want)
	}
	t.Setenv("SMOLVM_DATA_DIR", filepath.Join(dir, "env"))
	if got, want := open(), filepath.Join(dir, "env"); got != want {
		t.Errorf("by the environment: %s, want %s", got, want)
	}
}

func TestSameIDTwice(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	mustCreate(t, m, smolvm.VMConfig{ID: "twin"})
	if _, err := m.Create(t.Context(), smolvm.VMConfig{ID: "twin"}, smolvm.CreateOptions{}); !errors.Is(err, smolvm.ErrVMAlreadyExists) || !strings.Contains(err.Error(), "twin") {
		t.Errorf("second create: %v", err)
	}
	if vms, err := m.List(t.Context(), smolvm.ListOptions{}); err != nil || len(vms) != 1 {
		t.Errorf("there are %d VMs, %v", len(vms), err)
	}
}

// Many at once get different leases, ports and disks.
func TestConcurrentCreates(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	const n = 24
	var all sync.WaitGroup
	infos := make([]smolvm.VMInfo, n)
	for i := range n {
		all.Go(func() {
			var err error
			if infos[i], err = m.Create(context.Background(), smolvm.VMConfig{}, smolvm.CreateOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	seen := map[any]bool{}
	for _, info := range infos {
		for _, key := range []any{info.ID, info.DiskPath, info.Network.GuestMAC, info.Network.SSHHostPort} {
			if seen[key] {
				t.Errorf("%v is given out twice", key)
			}
			seen[key] = true
		}
	}
}

// A port that another program takes between create and start is not the VM's end.
func TestSSHPortTakenMeanwhile(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	vm := mustCreate(t, m, smolvm.VMConfig{SSHHostAddr: ownAddr(t)})
	taken, err := net.Listen("tcp", hostAddr(smolvm.PortForward{HostAddr: vm.Network.SSHHostAddr, HostPort: vm.Network.SSHHostPort}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	started, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if started.Network.SSHHostPort == vm.Network.SSHHostPort {
		t.Errorf("the VM still has port %d", vm.Network.SSHHostPort)
	}
	mustBeSSH(t, smolvm.PortForward{HostAddr: started.Network.SSHHostAddr, HostPort: started.Network.SSHHostPort})
}

// mustBeSSH checks that a guest's SSH server answers at the host port of a forward.
func mustBeSSH(t *testing.T, f smolvm.PortForward) {
	t.Helper()
	conn := dialTCP(t, f)
	defer func() { _ = conn.Close() }()
	banner := make([]byte, 4)
	if _, err := conn.Read(banner); err != nil || string(banner) != "SSH-" {
		t.Errorf("at the new port: %q, %v", banner, err)
	}
}

// So it is with the port of a forward that was left open, but not with one that was named.
func TestForwardPortTakenMeanwhile(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	addr := ownAddr(t)
	for name, hostPort := range map[string]int{"chosen": 0, "named": 18_080} {
		t.Run(name, func(t *testing.T) {
			vm := mustCreate(t, m, smolvm.VMConfig{PortForwards: []smolvm.PortForward{{HostAddr: addr, HostPort: hostPort, GuestPort: 22}}})
			before := vm.Network.PortForwards[0]
			taken, err := net.Listen("tcp", hostAddr(before))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = taken.Close() }()
			started, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{})
			if name == "named" {
				if !errors.Is(err, smolvm.ErrPortInUse) {
					t.Errorf("error = %v, want ErrPortInUse", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			after := started.Network.PortForwards[0]
			if after.HostPort == before.HostPort {
				t.Errorf("the VM still has port %d", before.HostPort)
			}
			if listed, err := m.PortForwards(t.Context(), vm.ID); err != nil || len(listed) != 1 || listed[0] != after {
				t.Errorf("its forwards are %v, %v, want %v", listed, err, after)
			}
			mustBeSSH(t, after)
		})
	}
}

// What keeps a start from succeeding leaves the VM as it is to be, its log readable, and
// nothing running.
func TestFailedStarts(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	disk := filepath.Join(t.TempDir(), "drive")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	brief := smolvm.StartOptions{Timeout: 2 * time.Second}
	for name, test := range map[string]struct {
		config smolvm.VMConfig
		opts   smolvm.StartOptions
		faults string
		before func()
		want   []string
		is     error
		state  smolvm.VMState
	}{
		"VMM is missing": {faults: vmmfake.Missing, want: []string{"not found"}, state: smolvm.StateCreated},
		"VMM dies":       {faults: vmmfake.Dies, want: []string{"as it was told"}, state: smolvm.StateCreated},
		"no agent": {
			faults: vmmfake.NoAgent, opts: brief,
			want: []string{"boot timed out", "console ends with", "vmmfake"}, is: smolvm.ErrBootTimeout, state: smolvm.StateError,
		},
		"no agent, no SSH": {
			config: smolvm.VMConfig{Ready: smolvm.ReadySSH}, faults: vmmfake.NoAgent, opts: brief,
			want: []string{"boot timed out", `by "ssh"`}, is: smolvm.ErrBootTimeout, state: smolvm.StateError,
		},
		"silent": {faults: vmmfake.Silent, opts: brief, want: []string{"boot timed out"}, is: smolvm.ErrBootTimeout, state: smolvm.StateError},
		"drive is gone": {
			config: smolvm.VMConfig{Drives: []smolvm.Drive{{Path: disk}}},
			before: func() { _ = os.Remove(disk) },
			want:   []string{"no such file"}, state: smolvm.StateCreated,
		},
	} {
		t.Run(name, func(t *testing.T) {
			vm := mustCreate(t, m, test.config)
			if test.before != nil {
				test.before()
			}
			faulty(t, m, vm.ID, test.faults)
			_, err := m.Start(t.Context(), vm.ID, test.opts)
			if err == nil {
				t.Fatal("the start succeeds")
			}
			for _, want := range append(test.want, vm.ID) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error lacks %q: %v", want, err)
				}
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("error is not %v: %v", test.is, err)
			}
			got, err := m.Get(t.Context(), vm.ID)
			if err != nil || got.State != test.state {
				t.Errorf("state is %s, %v; want %s", got.State, err, test.state)
			}
			if left := testenv.Processes(m.DataDir()); len(left) > 0 {
				t.Errorf("processes are left: %q", left)
			}
			checkEmpty(t, m.SocketDir())
			log, err := m.Logs(t.Context(), vm.ID, smolvm.LogOptions{})
			if err != nil {
				t.Fatal(err)
			}
			_ = log.Close()
			if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("shim dies at once", func(t *testing.T) {
		dead := []string{"/bin/sh", "-c", "echo no luck >&2; exit 1"}
		config := manager.Config{DataDir: m.DataDir(), SocketDir: m.SocketDir(), ShimCommand: dead}
		broken, err := manager.Open(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = broken.Close() }()
		vm := mustCreate(t, m, smolvm.VMConfig{})
		if _, err := broken.Start(t.Context(), vm.ID, smolvm.StartOptions{}); err == nil || !strings.Contains(err.Error(), "no luck") {
			t.Errorf("error is %v", err)
		}
	})
	// One that is ready by its SSH server.
	vm := mustRun(t, m, smolvm.VMConfig{Ready: smolvm.ReadySSH})
	sh(t, m, vm.ID, "true")
}

// A guest that panics while it boots leaves its VM in error, and says why.
func TestPanicAtBoot(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	panics := testenv.Initramfs(t, "echo about to fail; exit 1\n")
	vm := mustCreate(t, m, smolvm.VMConfig{KernelPath: testenv.Kernel(t), InitrdPath: panics, Ready: smolvm.ReadySSH})
	_, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{})
	for _, want := range []string{"panicked", "Attempted to kill init", "console ends with", vm.ID} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q: %v", want, err)
		}
	}
	if got := mustGet(t, m, vm.ID); got.State != smolvm.StateError {
		t.Errorf("state is %s", got.State)
	}
}

// QEMU may be missing, or die at once; PATH decides which one is found.
func TestQEMUMissingOrBroken(t *testing.T) {
	m := openAt(t, testConfig(t, tempDir(t)))
	vm := mustCreate(t, m, withoutImage(t, ""))
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	_, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{})
	var missing *smolvm.PrerequisiteError
	if !errors.As(err, &missing) || !strings.Contains(err.Error(), "qemu-system") {
		t.Errorf("without QEMU: %v", err)
	}
	if got, err := m.Get(t.Context(), vm.ID); err != nil || got.State != smolvm.StateCreated {
		t.Errorf("without QEMU the VM is %s, %v", got.State, err)
	}
	script := "#!/bin/sh\necho 'qemu: out of luck' >&2\nexit 3\n"
	if err := os.WriteFile(filepath.Join(bin, "qemu-system-x86_64"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err = m.Start(t.Context(), vm.ID, smolvm.StartOptions{})
	if err == nil || !strings.Contains(err.Error(), "out of luck") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("with a QEMU that dies at once: %v", err)
	}
	if got, err := m.Get(t.Context(), vm.ID); err != nil || got.State != smolvm.StateCreated || !strings.Contains(got.Cause, "out of luck") {
		t.Errorf("with a QEMU that dies at once the VM is %s, %v", got.State, err)
	}
}

// A caller that gives up a start leaves the VM as it was.
func TestStartCancelled(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	vm := mustCreate(t, m, smolvm.VMConfig{})
	faulty(t, m, vm.ID, vmmfake.Silent)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
	if got, err := m.Get(t.Context(), vm.ID); err != nil || got.State != smolvm.StateCreated {
		t.Errorf("state is %s, %v", got.State, err)
	}
	if left := testenv.Processes(m.DataDir()); len(left) > 0 {
		t.Errorf("processes are left: %q", left)
	}
	faulty(t, m, vm.ID, "")
	if _, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{}); err != nil {
		t.Errorf("start after one that was given up: %v", err)
	}
}

// A socket directory of any length works.
func TestLongSocketDir(t *testing.T) {
	t.Parallel()
	config := useFake(t)
	config.SocketDir = filepath.Join(filepath.Dir(config.DataDir), strings.Repeat("long", 20), strings.Repeat("path", 20))
	m, err := manager.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	vm := mustRun(t, m, smolvm.VMConfig{ID: strings.Repeat("i", 64)})
	if len(vm.SocketPath) > 107 {
		t.Errorf("socket path has %d bytes: %s", len(vm.SocketPath), vm.SocketPath)
	}
	if got := sh(t, m, vm.ID, "echo works"); got != "works" {
		t.Errorf("exec printed %q", got)
	}
	if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(vm.SocketPath)); !os.IsNotExist(err) {
		t.Errorf("the runtime directory is left: %v", err)
	}
	checkNothingLeft(t, config)
}

// A disk that does not fit leaves no VM behind.
func TestCreateDiskFull(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system takes root")
	}
	m := openFake(t)
	if err := unix.Mount("tmpfs", m.DiskDir(), "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("mounting is not allowed here: ", err)
	}
	defer func() { _ = unix.Unmount(m.DiskDir(), 0) }()
	_, err := m.Create(t.Context(), smolvm.VMConfig{ID: "full"}, smolvm.CreateOptions{})
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), `"full"`) {
		t.Errorf("error is %v", err)
	}
	if _, err := m.Get(t.Context(), "full"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("the VM is there: %v", err)
	}
	checkEmpty(t, m.DiskDir())
}
