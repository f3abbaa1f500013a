package testenv

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/smolvm/smolvm/internal/host"
)

// bedEnv is set in the outer machine of package kvmtest, where there is nothing to build with:
// all that tests need of this module is in the cache.
const bedEnv = "SMOLVM_TEST_BED"

// BedEnvironment returns the environment of tests that run in the outer machine of package
// kvmtest, where their cache is in a directory.
func BedEnvironment(cache string) []string {
	env := []string{bedEnv + "=1", cacheEnv + "=" + cache}
	if kernel := KernelOfOurs(); kernel != "" {
		// The drive has it as the host does: by its key.
		env = append(env, kernelEnv+"="+filepath.Join(cache, keyOf(kernel), filepath.Base(kernel)))
	}
	return env
}

func inBed() bool { return os.Getenv(bedEnv) != "" }

// RequireKVM skips a test where KVM does not work, and in short mode. Package kvmtest runs such
// tests on any host: a new one has to be part of a job there.
func RequireKVM(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("real VMs are left out in short mode")
	}
	if problem := kvmProblem(); problem != "" {
		t.Skipf("it runs by `make test-kvm`, in a VM, as KVM does not work on this host: %s", problem)
	}
}

// KVMProblem returns why KVM does not work on this host; empty: it does.
func KVMProblem() string { return kvmProblem() }

// kvmProblem probes KVM once in a test's process, and once in a boot of the host.
var kvmProblem = sync.OnceValue(func() string {
	options := host.Options{}
	if dir, err := cache(); err == nil {
		options.CacheDir = filepath.Join(dir, "host")
	}
	found := host.New(options).Accelerator(context.Background())
	// In the outer machine KVM works, and is slow: the host may have been too busy for a probe.
	for again := 0; inBed() && found.Name != host.KVM && again < 3; again++ {
		found = host.New(host.Options{}).Accelerator(context.Background())
	}
	if found.Name == host.KVM {
		return ""
	}
	if found.Reason == "" {
		return fmt.Sprintf("its accelerator is %s", found.Name)
	}
	return found.Reason
})

// Module returns the directory of this module.
func Module(t testing.TB) string {
	t.Helper()
	dir, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// Program returns a program that the tests need and no distribution has: that of PATH, or the one
// that scripts/install-deps.sh has put into the checkout. It skips the test if there is none.
func Program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path, err = exec.LookPath(filepath.Join(Module(t), "bin/tools", name))
	}
	if err != nil {
		t.Skip("`scripts/install-deps.sh test` installs it: ", err)
	}
	return path
}
