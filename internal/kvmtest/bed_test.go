package kvmtest_test

import (
	"os"
	"slices"
	"testing"

	"github.com/smolvm/smolvm/internal/kvmtest"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/shim"
)

func TestMain(m *testing.M) {
	shim.Main() // the outer machine's
	os.Exit(m.Run())
}

// jobsEnv says what TestBed runs: "all", or one job as [kvmtest.ParseJob] reads it.
const jobsEnv = "SMOLVM_TEST_KVM"

// Tests that need KVM pass: in an outer machine, or on this host if KVM works here.
func TestBed(t *testing.T) {
	asked := os.Getenv(jobsEnv)
	if asked == "" {
		t.Skip("it takes minutes: `make test-kvm` runs it, and so does `make test` at its end")
	}
	chosen := jobs()
	switch asked {
	case "all":
	case "engine":
		chosen = engineJobs([]string{"firecracker"}, []string{"firecracker", "jailer"})
	default:
		job, err := kvmtest.ParseJob(asked)
		if err != nil {
			t.Fatal(err)
		}
		chosen = []kvmtest.Job{job}
	}
	chosen = slices.DeleteFunc(chosen, func(job kvmtest.Job) bool {
		lacks := job.Lacks(testenv.Module(t))
		if lacks == "" {
			return false
		}
		t.Run(job.Name(), func(t *testing.T) {
			t.Skipf("LEFT OUT: it needs %s, which this host has not; `scripts/install-deps.sh test` says why", lacks)
		})
		return true
	})
	problem := testenv.KVMProblem()
	if problem == "" {
		t.Log("KVM works on this host: the tests run on it directly")
		for _, job := range chosen {
			t.Run(job.Name(), func(t *testing.T) { kvmtest.RunDirectly(t, job) })
		}
		return
	}
	t.Logf("KVM does not work on this host (%s): the tests run in VMs", problem)
	bed := kvmtest.Open(t, chosen)
	for _, job := range chosen {
		t.Run(job.Name(), func(t *testing.T) {
			t.Parallel()
			bed.Run(t, job)
		})
	}
}
