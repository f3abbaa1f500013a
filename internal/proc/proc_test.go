package proc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// parentCommand makes this test's program start a child and wait to be killed.
const parentCommand = "parent"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == parentCommand {
		child, err := Start(exec.Command("sleep", "1000"))
		if err != nil {
			os.Exit(1)
		}
		start, _ := StartTime(child.PID())
		fmt.Println(child.PID(), start)
		<-child.Done()
		return
	}
	os.Exit(m.Run())
}

func TestParseStat(t *testing.T) {
	tail := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 424242 20 21\n"
	for name, want := range map[string]bool{"(sh)": true, "(a b) (c)": true, "())": true, "(": false, "": false} {
		start, state, err := parseStat([]byte("7 " + name + tail))
		if (err == nil) != want || want && (start != 424242 || state != 'S') {
			t.Errorf("%q: %d, %c, %v", name, start, state, err)
		}
	}
}

func TestChild(t *testing.T) {
	child, err := Start(exec.Command("sh", "-c", "exit 3"))
	if err != nil {
		t.Fatal(err)
	}
	<-child.Done()
	if child.Success() || child.Exit() != "exit status 3" {
		t.Errorf("exit is %q", child.Exit())
	}
	if err := errors.Join(child.Signal(syscall.SIGTERM), child.Kill()); err != nil {
		t.Errorf("signals to a child that is gone: %v", err)
	}
	if _, err := Start(exec.Command("/no/such/program")); err == nil {
		t.Error("a program that is not there starts")
	}
}

func TestKillChild(t *testing.T) {
	child, err := Start(exec.Command("sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	start, err := StartTime(child.PID())
	if err != nil || !Alive(child.PID(), start) {
		t.Fatalf("it is not alive: %v", err)
	}
	if Alive(child.PID(), start+1) {
		t.Error("a process of another start time is taken for it")
	}
	// A pid that now belongs to another process must not be touched.
	if err := Kill(t.Context(), child.PID(), start+1); err != nil || !Alive(child.PID(), start) {
		t.Errorf("it was killed by another's start time: %v", err)
	}
	if err := child.Kill(); err != nil || child.Exit() != "signal: killed" {
		t.Errorf("exit is %q, %v", child.Exit(), err)
	}
	if Alive(child.PID(), start) {
		t.Error("it is still alive")
	}
}

// A zombie is dead, though its pid is there.
func TestZombie(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	start, err := StartTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := Kill(t.Context(), cmd.Process.Pid, start); err != nil { // nobody has reaped it yet
		t.Fatal(err)
	}
	if Alive(cmd.Process.Pid, start) {
		t.Error("a zombie is alive")
	}
	if err := Wait(t.Context(), cmd.Process.Pid, start); err != nil {
		t.Errorf("wait for a zombie: %v", err)
	}
	_ = cmd.Wait()
	if err := Kill(t.Context(), cmd.Process.Pid, start); err != nil {
		t.Errorf("kill of what is gone: %v", err)
	}
}

func TestWaitCancelled(t *testing.T) {
	child, err := Start(exec.Command("sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = child.Kill() }()
	start, err := StartTime(child.PID())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- Wait(ctx, child.PID(), start) }()
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}

// A child does not outlive its parent, whichever way that ends.
func TestParentDeath(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	parent := exec.Command(self, parentCommand)
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	var pid int
	var start uint64
	if _, scanErr := fmt.Sscan(line, &pid, &start); err != nil || scanErr != nil || !Alive(pid, start) {
		t.Fatalf("the parent says %q: %v, %v", line, err, scanErr)
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := Wait(t.Context(), pid, start); err != nil {
		t.Error(err)
	}
	_ = parent.Wait()
}

func TestBootID(t *testing.T) {
	a, errA := BootID()
	b, errB := BootID()
	if errA != nil || errB != nil || a != b || len(a) != 36 {
		t.Errorf("boot ids %q, %q (%v, %v)", a, b, errA, errB)
	}
}
