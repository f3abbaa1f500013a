package cli_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/cli"
	"github.com/smolvm/smolvm/internal/image/imagetest"
	"github.com/smolvm/smolvm/internal/testenv"
)

var update = flag.Bool("update", false, "write the output that scripts compare with anew")

// TestMain makes this test's program the smolvm command, also when it is run as a
// shim.
func TestMain(m *testing.M) {
	testscript.Main(checked{m}, map[string]func(){"smolvm": func() {
		program := cli.Program{
			Stdin:   os.Stdin,
			Stdout:  os.Stdout,
			Stderr:  os.Stderr,
			Version: "v0.0.0-test",
		}
		os.Exit(program.Run(context.Background(), os.Args[1:]))
	}})
}

// checked fails the tests if a shim is left at their end, and so a VM.
type checked struct{ *testing.M }

func (c checked) Run() int {
	code := c.M.Run()
	program, err := exec.LookPath("smolvm")
	if err != nil {
		program = err.Error()
	}
	if left := testenv.Processes(program + " shim"); len(left) > 0 {
		fmt.Fprintln(os.Stderr, "left behind: processes", left)
		return 1
	}
	return code
}

// TestScript is all that can be seen without a VM.
func TestScript(t *testing.T) {
	t.Parallel()
	testscript.Run(t, params("testdata/script", func(env *testscript.Env) error {
		return seal(env)
	}))
}

// TestVM is what takes real VMs.
func TestVM(t *testing.T) {
	t.Parallel()
	testenv.RequireQEMU(t)
	agent, shared := testenv.Agent(t), testenv.Shared(t)
	kernel := testenv.Kernel(t)
	program := testenv.Build(t, "github.com/smolvm/smolvm/internal/testenv/sayargs")
	initramfs := testenv.Initramfs(t, "echo console of the guest >/dev/ttyS0; poweroff -f\n")
	testscript.Run(t, params("testdata/vm", func(env *testscript.Env) error {
		if err := seal(env); err != nil {
			return err
		}
		env.Setenv("KERNEL", kernel)
		// Each script has an image of its own, as the store of images is shared.
		env.Setenv("OCI", pushedProgram(t, filepath.Base(env.WorkDir), program))
		env.Setenv("INITRAMFS", initramfs)
		env.Defer(func() { checkEmpty(env) })
		return seed(env, agent, shared)
	}))
}

func params(dir string, setup func(*testscript.Env) error) testscript.Params {
	return testscript.Params{
		Dir:   dir,
		Setup: setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status":  status,
			"fetch":   fetch,
			"endpool": endPool,
		},
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	}
}

// status N PROGRAM ARG... runs a program, and checks that it exits with status N.
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N program [args...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	switch err := ts.Exec(args[1], args[2:]...); {
	case errors.As(err, &exit):
		got = exit.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
}

// endpool ends the only pool.
func endPool(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: endpool")
	}
	ts.Check(ts.Exec("smolvm", "pool", "ls", "--json"))
	var pools []smolvm.Pool
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &pools))
	if len(pools) != 1 {
		ts.Fatalf("pools are %+v", pools)
	}
	ts.Check(ts.Exec("smolvm", "pool", "rm", pools[0].ID))
}

// fetch FILE prints the page of the HTTP server whose address is in a file.
func fetch(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: fetch file")
	}
	response, err := http.Get("http://" + strings.TrimSpace(ts.ReadFile(args[0])))
	ts.Check(err)
	page, err := io.ReadAll(response.Body)
	ts.Check(errors.Join(err, response.Body.Close()))
	_, err = ts.Stdout().Write(page)
	ts.Check(err)
}

// seal gives a script a data directory and a socket directory of its own, and a file
// that passes for a kernel.
func seal(env *testscript.Env) error {
	kernel := filepath.Join(env.WorkDir, ".vmlinux")
	if err := os.WriteFile(kernel, imagetest.TinyKernel(), 0o600); err != nil {
		return err
	}
	env.Setenv("ELF", kernel)
	env.Setenv("SMOLVM_DATA_DIR", dataDir(env))
	env.Setenv("SMOLVM_BACKEND", "")
	env.Setenv("SMOLVM_TEMPLATES", "off") // but for scripts that are about them
	env.Setenv("XDG_RUNTIME_DIR", env.WorkDir)
	return nil
}

func dataDir(env *testscript.Env) string { return filepath.Join(env.WorkDir, ".data") }

// seed gives a script the agent, and what data directories share, by links.
func seed(env *testscript.Env, agent string, shared map[string]string) error {
	bin := filepath.Join(env.WorkDir, ".bin")
	for _, dir := range []string{bin, dataDir(env)} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	env.Setenv("PATH", bin+string(filepath.ListSeparator)+env.Getenv("PATH"))
	return errors.Join(os.Symlink(agent, filepath.Join(bin, "smolvm-agent")), testenv.LinkShared(shared, dataDir(env)))
}

// checkEmpty fails a script that has left a VM, or anything of one.
func checkEmpty(env *testscript.Env) {
	t := env.T()
	cmd := exec.Command("smolvm", "--data-dir", dataDir(env), "rm", "--all")
	cmd.Env = env.Vars
	left, err := cmd.CombinedOutput()
	if err != nil {
		t.Log("smolvm rm --all: ", err)
	}
	if len(left) > 0 {
		t.Log("left behind: VMs ", string(left))
	}
	failed := err != nil || len(left) > 0
	for _, pattern := range []string{"vms/*", "disks/*", "locks/*", "../smolvm/*"} {
		paths, _ := filepath.Glob(filepath.Join(dataDir(env), pattern))
		for _, path := range paths {
			t.Log("left behind: ", path)
			failed = true
		}
	}
	if failed {
		t.FailNow()
	}
}
