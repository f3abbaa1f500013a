package vmmtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/vmm"
)

// ended checks how a VM has ended.
func (g *guest) ended(reason vmm.ExitReason, detail string, started time.Time) {
	g.Helper()
	exit := g.end()
	if exit.Reason != reason || !strings.Contains(exit.Detail, detail) {
		g.Errorf("Exit = %+v, want reason %s and %q in the detail", exit, reason, detail)
	}
	if exit.At.Before(started) || exit.At.After(time.Now()) {
		g.Errorf("Exit says that it ended at %s, between %s and now", exit.At, started)
	}
	if err := unix.Kill(g.PID(), 0); err == nil {
		g.Errorf("the VMM, process %d, has not been reaped when Done is closed", g.PID())
	}
	// All that may be asked of a VM in its end succeeds, and changes nothing.
	if err := g.Shutdown(g.Context()); err != nil {
		g.Errorf("Shutdown of a VM that has ended: %v", err)
	}
	if err := g.Kill(g.Context()); err != nil {
		g.Errorf("Kill of a VM that has ended: %v", err)
	}
	if again := g.Exit(); again != exit {
		g.Errorf("Exit = %+v at first, then %+v", exit, again)
	}
}

func powerOff(k *kit) {
	started := time.Now()
	g := k.boot(nil)
	select {
	case <-g.Done():
		k.Error("Done is closed while the VM runs")
	default:
	}
	g.tell("poweroff -f")
	g.ended(vmm.ExitPowerOff, "", started)
}

func reboot(k *kit) {
	started := time.Now()
	g := k.boot(func(c *vmm.Config) {
		// A panic of an earlier run is not this one's.
		old := "[    1.0] Kernel panic - not syncing: of an earlier run\n"
		if err := os.WriteFile(c.ConsolePath, []byte(old), 0o600); err != nil {
			k.Fatal(err)
		}
	})
	g.tell("reboot -f")
	g.ended(vmm.ExitReboot, "", started)
}

// kernelPanic: the kernel panics when its init ends, and says so.
func kernelPanic(k *kit) {
	started := time.Now()
	g := k.boot(nil)
	g.tell("exit 1")
	g.ended(vmm.ExitPanic, "Attempted to kill init!", started)
}

// crash: somebody else kills the VMM.
func crash(k *kit) {
	started := time.Now()
	g := k.boot(nil)
	if err := unix.Kill(g.PID(), unix.SIGKILL); err != nil {
		k.Fatal(err)
	}
	g.ended(vmm.ExitCrashed, "killed", started)
}

// kill: of calls at the same time each returns when the VM has ended.
func kill(k *kit) {
	started := time.Now()
	g := k.boot(nil)
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() { g.kill(k.Context()) })
	}
	group.Wait()
	g.ended(vmm.ExitKilled, "", started)
}

// killAtOnce: a call that has no time left kills the VM all the same.
func killAtOnce(k *kit) {
	started := time.Now()
	g := k.start(nil)
	ctx, cancel := context.WithCancel(k.Context())
	cancel()
	g.kill(ctx)
	g.ended(vmm.ExitKilled, "", started)
}

// killHung: a VMM that does not do what it is asked is killed when the time is up.
func killHung(k *kit) {
	started := time.Now()
	g := k.start(nil)
	if err := unix.Kill(g.PID(), unix.SIGSTOP); err != nil {
		k.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(k.Context(), 100*time.Millisecond)
	defer cancel()
	g.kill(ctx)
	g.ended(vmm.ExitKilled, "", started)
}

// shutdown: a guest that does not listen goes on, however often it is asked.
func shutdown(k *kit) {
	g := k.boot(nil)
	for range 3 {
		if err := g.Shutdown(k.Context()); err != nil {
			k.Errorf("shutdown: %v", err)
		}
	}
	if got := g.run("echo going on"); got != "going on" {
		k.Errorf("the guest says %q", got)
	}
}

// pause: a guest that is held does nothing until it is resumed.
func pause(k *kit) {
	g := k.boot(nil)
	pauser, ok := g.Instance.(vmm.Pauser)
	if !ok {
		k.Skip("this backend can't pause VMs")
	}
	must := func(what string, do func(context.Context) error) {
		k.Helper()
		if err := do(k.Context()); err != nil {
			k.Fatalf("%s: %v", what, err)
		}
	}
	must("pause", pauser.Pause)
	must("pause again", pauser.Pause)
	g.tell("echo awake")
	select {
	case line := <-g.lines:
		k.Errorf("a paused guest says %q", line)
	// If the guest runs on, it answers within this time on any host that is not
	// badly overloaded; on such a one the test sees nothing.
	case <-time.After(300 * time.Millisecond):
	}
	must("resume", pauser.Resume)
	must("resume again", pauser.Resume)
	if got := g.line(); got != "awake" {
		k.Errorf("a resumed guest says %q", got)
	}
	must("pause", pauser.Pause)
	if exit := g.killed(); exit.Reason != vmm.ExitKilled {
		k.Errorf("Exit of a paused VM = %+v", exit)
	}
}

// parentEnv makes a test's process the parent of [diesWithParent].
const parentEnv = "SMOLVM_VMMTEST_PARENT"

// diesWithParent: the VMM of a process that is killed is killed too. The process is
// this test, run again.
func diesWithParent(k *kit) {
	if os.Getenv(parentEnv) != "" {
		g := k.boot(nil)
		_, _ = fmt.Fprintf(os.Stdout, "\nVMM %d\n", g.PID())
		<-k.Context().Done() // not before it is killed
		return
	}
	cmd := k.again(k.Context(), parentEnv)
	output, err := cmd.StdoutPipe()
	if err != nil {
		k.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		k.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	pid := 0
	scanner := bufio.NewScanner(output)
	for pid == 0 && scanner.Scan() {
		_, _ = fmt.Sscanf(scanner.Text(), "VMM %d", &pid)
		if pid == 0 {
			k.Log("the parent says: ", scanner.Text())
		}
	}
	if pid == 0 {
		k.Fatalf("the parent starts no VM: %v", scanner.Err())
	}
	vmmProcess, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		k.Fatal(err)
	}
	defer func() { _ = unix.Close(vmmProcess) }()
	if err := cmd.Process.Kill(); err != nil {
		k.Fatal(err)
	}
	if err := waitProcess(vmmProcess); err != nil {
		k.Errorf("the VMM outlives its parent: %v", err)
		_ = unix.PidfdSendSignal(vmmProcess, unix.SIGKILL, nil, 0)
	}
}

// waitProcess waits for the end of a pidfd's process.
func waitProcess(pidfd int) error {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for limit := time.Now().Add(patience); ; {
		left := time.Until(limit)
		if left <= 0 {
			return context.DeadlineExceeded
		}
		ended, err := unix.Poll(fds, int(left.Milliseconds())+1)
		if ended == 1 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
