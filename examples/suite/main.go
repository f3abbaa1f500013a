// Suite runs the tests of a project in a VM of its own: it installs what the project needs, runs
// pytest or Node's test runner, and brings the result out as JUnit's XML.
//
//	go run ./examples/suite [flags] [project directory] [result file]
//	go run ./examples/suite examples/suite/python junit.xml
//	go run ./examples/suite -index http://192.0.2.7:8000 -allow @host:8000/tcp examples/suite/node
//
// The project is an overlay: what is installed and built in the VM never gets into the directory.
// With -allow the VM reaches nothing else. The image is `dev`, of the distribution's packages, unless
// -image names another.
//
// It is the shim of its VM itself, so it does not need the smolvm program. If it must build
// the image, it takes the smolvm-agent program from beside itself or PATH (`make build`, then
// PATH=$PWD/bin:$PATH).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
	"github.com/smolvm/smolvm/shim"
)

// Where the VM has the project, and the result of its tests.
const (
	projectDir = "/project"
	resultFile = "/tmp/junit.xml"
)

// memoryMiB is the VM's memory: npm takes more than the default.
const memoryMiB = 1024

// suite is how projects of a kind are tested.
type suite struct {
	// Marker is a file that such a project has.
	marker string
	// Install installs what the project needs, and test runs its tests.
	install, test []string
	// Index returns the environment that has packages come from an index of one's own.
	index func(*url.URL) []string
}

func suites() []suite {
	return []suite{
		{
			marker:  "requirements.txt",
			install: []string{"python3", "-m", "pip", "install", "--disable-pip-version-check", "-r", "requirements.txt"},
			test:    []string{"python3", "-m", "pytest", "--junitxml", resultFile},
			index: func(at *url.URL) []string {
				return []string{"PIP_INDEX_URL=" + at.JoinPath("simple").String(), "PIP_TRUSTED_HOST=" + at.Host}
			},
		},
		{
			marker:  "package.json",
			install: []string{"npm", "install", "--no-audit", "--no-fund"},
			test: []string{
				"node", "--test", "--test-reporter", "spec", "--test-reporter-destination", "stdout",
				"--test-reporter", "junit", "--test-reporter-destination", resultFile,
			},
			index: func(at *url.URL) []string { return []string{"NPM_CONFIG_REGISTRY=" + at.JoinPath("npm").String()} },
		},
	}
}

// job is a project whose tests are to be run.
type job struct {
	image   string
	project string // its directory
	result  string // the file that gets what comes of it
	// index is where packages come from: Python's at /simple, Node's at /npm. Nil: the public ones.
	index *url.URL
	// allow are rules of an egress policy: "@host:8000/tcp". None: the VM reaches the outside.
	allow []string
}

func main() {
	shim.Main() // does not return in the process beside the VM
	j := job{project: ".", result: "junit.xml"}
	flag.StringVar(&j.image, "image", "dev", "the image of the VM")
	flag.Func("index", "the URL of a package index of your own", func(text string) (err error) {
		j.index, err = url.Parse(text)
		return err
	})
	flag.Func("allow", "what the VM may reach, and nothing else: example.com:443, @host:8000/tcp", func(text string) error {
		j.allow = append(j.allow, "allow "+text)
		return nil
	})
	flag.Parse()
	if flag.NArg() > 0 {
		j.project = flag.Arg(0)
	}
	if flag.NArg() > 1 {
		j.result = flag.Arg(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := j.run(ctx, manager.Config{Embedded: true})
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "suite:", err)
		os.Exit(1)
	}
}

// suite returns how the project is tested.
func (j job) suite() (suite, error) {
	for _, s := range suites() {
		if _, err := os.Stat(filepath.Join(j.project, s.marker)); err == nil {
			return s, nil
		}
	}
	return suite{}, fmt.Errorf("%s has neither requirements.txt nor package.json", j.project)
}

// run runs the tests. They may have failed: then there is a result, and an error.
func (j job) run(ctx context.Context, config manager.Config) (err error) {
	s, err := j.suite()
	if err != nil {
		return err
	}
	m, err := manager.Open(ctx, config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()

	// Ephemeral: the VM goes when this program does, even if it is killed.
	vmConfig := smolvm.VMConfig{
		Image: j.image, MemoryMiB: memoryMiB, Ephemeral: true,
		Mounts: []smolvm.Mount{{Source: j.project, Target: projectDir, Mode: smolvm.MountOverlay}},
	}
	if len(j.allow) > 0 {
		vmConfig.Egress = &smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: j.allow}
	}
	info, err := m.Create(ctx, vmConfig, smolvm.CreateOptions{Progress: report})
	if err != nil {
		return err
	}
	vm := m.VM(info.ID)
	defer func() { err = errors.Join(err, vm.Delete(context.WithoutCancel(ctx), smolvm.DeleteOptions{})) }()
	if _, err := vm.Start(ctx, smolvm.StartOptions{}); err != nil {
		return err
	}
	var env []string
	if j.index != nil {
		env = s.index(j.index)
	}
	if err := execute(ctx, vm, s.install, env); err != nil {
		return err
	}
	failed := execute(ctx, vm, s.test, nil)
	return errors.Join(failed, vm.CopyFrom(ctx, resultFile, j.result))
}

// execute runs a command in the project's directory.
func execute(ctx context.Context, vm smolvm.VM, args, env []string) error {
	status, err := vm.Exec(ctx, smolvm.Command{Args: args, Env: env, Dir: projectDir, Stdout: os.Stdout, Stderr: os.Stderr})
	if err != nil {
		return err
	}
	if !status.Success() {
		return fmt.Errorf("%s ended with %s", args[0], status)
	}
	return nil
}

// report tells what is done to an image that is not here yet.
func report(p smolvm.Progress) {
	if p.Done == 0 {
		fmt.Fprintln(os.Stderr, p.Phase)
	}
}
