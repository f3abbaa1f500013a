package shim_test

import (
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
)

// A QEMU that is stopped by a signal answers nothing, and is ended in time (C3).
func TestRealStopOfHungVMM(t *testing.T) {
	t.Parallel()
	f := newRealFixture(t)
	launched := f.launch()
	testenv.Suspend(t, launched.VMMPID)
	began := time.Now()
	f.stop(time.Second)
	record := f.end(launched)
	if took := time.Since(began); took > 6*time.Second { // the time, a second, and some for a busy host
		t.Errorf("it took %s", took)
	}
	if record.Exit.Reason != vmm.ExitKilled {
		t.Errorf("exit record is %+v", record)
	}
}

// A kernel of the user's own whose init does nothing hears neither agent nor button.
func TestRealStopOfDeafGuest(t *testing.T) {
	t.Parallel()
	f := newRealFixture(t)
	f.opts.Spec.VMM.Initrd = testenv.Initramfs(t, "echo nobody listens; exec sleep 100000\n")
	f.opts.Spec.VMM.Channel = false
	f.opts.Spec.Hello, f.opts.Spec.Ready = nil, smolvm.ReadyStarted
	launched := f.launch()
	f.awaitConsoleText("nobody listens")
	began := time.Now()
	if err := f.client().Stop(t.Context(), shim.Stop{Grace: patience}); err != nil {
		t.Error(err)
	}
	record := f.end(launched)
	took := time.Since(began)
	t.Logf("it took %s: %s", took, record.Exit)
	if took > 15*time.Second || record.Exit.Reason != vmm.ExitKilled {
		t.Errorf("it took %s; exit record is %+v", took, record)
	}
}
