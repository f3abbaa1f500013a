package kvmtest_test

import (
	"os"
	"testing"
	"time"

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

// jobs returns all that is to be tested on KVM.
func jobs() []kvmtest.Job {
	return []kvmtest.Job{
		{Package: "internal/host", Flags: []string{"-run=^(TestAcceleratorOfThisHost|TestAcceleratorCancelled|TestProbe.*)$"}},
		{Package: "internal/host", Flags: []string{"-run=^(TestAcceleratorOfThisHost|TestProbe)$"}, AsUser: true},
		{Package: "internal/vmm/qemu", Flags: []string{"-run=^TestConformance$/^(q35|microvm)_on_KVM$"}},
		{
			Package: "internal/vmm/firecracker", Flags: []string{"-run=^TestConformance$", "-parallel=1"}, Timeout: 20 * time.Minute,
			// It has no overlays, and busy guests are left out.
			MaySkip: []string{"TestConformance/save_with_disks", "TestConformance/overlays_fail", "TestConformance/save_a_busy_guest_*"},
		},
	}
}

// Tests that need KVM pass: in an outer machine, or on this host if KVM works here.
func TestBed(t *testing.T) {
	asked := os.Getenv(jobsEnv)
	if asked == "" {
		t.Skip("it takes minutes, and both CPUs: `make test-kvm` runs it by itself")
	}
	chosen := jobs()
	if asked != "all" {
		job, err := kvmtest.ParseJob(asked)
		if err != nil {
			t.Fatal(err)
		}
		chosen = []kvmtest.Job{job}
	}
	problem := testenv.KVMProblem()
	if problem == "" {
		t.Log("KVM works on this host: the tests run on it directly")
		for _, job := range chosen {
			t.Run(job.Name(), func(t *testing.T) { kvmtest.RunDirectly(t, job) })
		}
		return
	}
	t.Logf("KVM does not work on this host (%s): the tests run in a VM", problem)
	bed := kvmtest.Open(t, chosen)
	for _, job := range chosen {
		t.Run(job.Name(), func(t *testing.T) { bed.Run(t, job) })
	}
}
