package cli_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
)

// A user runs a command by Firecracker, first in a VM that boots and then in a clone: as root in
// its jail and without one, and as somebody who may only open /dev/kvm.
func TestRunByFirecracker(t *testing.T) {
	testenv.RequireKVM(t)
	root := os.Getuid() == 0
	for name, jailed := range map[string]bool{"plain": false, "in its jail": true} {
		if jailed && !root {
			continue // who is not root has no jailer
		}
		t.Run(name, func(t *testing.T) { runByFirecracker(t, jailed) })
	}
}

func runByFirecracker(t *testing.T, jailed bool) {
	dir, err := os.MkdirTemp("", "smolvm-fc-") //nolint:usetesting // sockets are made below it: it has a short name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	programs := map[string]string{"smolvm-agent": testenv.Agent(t)}
	for _, name := range []string{"smolvm", "firecracker", "jailer"} {
		if name == "jailer" && !jailed {
			continue
		}
		if programs[name], err = exec.LookPath(name); err != nil {
			t.Fatal(err)
		}
	}
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, source := range programs {
		copyProgram(t, source, filepath.Join(bin, name))
	}
	data := filepath.Join(dir, "data")
	testenv.SeedImages(t, data)
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(bin, "smolvm"), args...)
		cmd.Env = []string{"HOME=" + dir, "XDG_RUNTIME_DIR=" + dir, "PATH=" + bin, "SMOLVM_DATA_DIR=" + data, "SMOLVM_BACKEND=firecracker"}
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("smolvm %q: %v\n%s", args, err, errs.String())
		}
		return strings.TrimSpace(string(out))
	}
	const uname = "uname -s"
	if got := run("run", "--cold", "--", "sh", "-c", uname); got != "Linux" {
		t.Errorf("a VM that boots says %q", got)
	}
	run("template", "build")
	if got := run("run", "--", "sh", "-c", uname); got != "Linux" {
		t.Errorf("a clone says %q", got)
	}
	id := run("create")
	run("start", id)
	var vm smolvm.VMInfo
	if err := json.Unmarshal([]byte(run("inspect", id)), &vm); err != nil {
		t.Fatal(err)
	}
	if vm.Backend != "firecracker" || vm.Start == nil || vm.Start.Method != smolvm.StartClone || len(vm.Start.Warnings) > 0 {
		t.Errorf("the VM is run by %s, and its start was %+v", vm.Backend, vm.Start)
	}
	var process unix.Stat_t
	if err := unix.Stat("/proc/"+strconv.Itoa(vm.PID), &process); err != nil {
		t.Fatal(err)
	}
	if own := int(process.Uid) == os.Getuid(); own == jailed {
		t.Errorf("Firecracker is run by user %d", process.Uid)
	}
	if got := run("exec", id, "--", "hostname"); got != id {
		t.Errorf("the VM is called %q", got)
	}
	run("rm", "-f", id)
	if left := run("ls", "-q"); left != "" {
		t.Errorf("left behind: VMs %s", left)
	}
	if left := testenv.Processes(bin + "/smolvm"); len(left) > 0 {
		t.Error(fmt.Sprint("left behind: processes ", left))
	}
}
