package shim_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
)

// hostileInit starts a program instead of the agent, with the guest channel.
const hostileInit = `mode=$(sed -n 's/.*hostile=\([a-z]*\).*/\1/p' /proc/cmdline)
while :; do
	for port in /sys/class/virtio-ports/*; do
		[ "$(cat $port/name 2>/dev/null)" = smolvm.agent ] && [ -c /dev/${port##*/} ] && exec hostile /dev/${port##*/} $mode
	done
	sleep 0.1
done
`

// maxShim is the memory that a shim may come to use, in bytes, whatever its guest does.
const maxShim = 64 << 20

// peakMemory is the most memory that a process has used, in bytes; see proc(5).
func peakMemory(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kib int
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	t.Fatal("no VmHWM in the status of the process")
	return 0
}

// An agent that turns on its host costs the shim neither memory nor its way to end the VM:
// stop, removal and the end of the time to live come in their time (S3, S4, C2).
func TestRealHostileAgent(t *testing.T) {
	t.Parallel()
	first := newRealFixture(t)
	initrd := testenv.InitramfsWith(t, hostileInit, "github.com/smolvm/smolvm/internal/testenv/hostile")
	const grace = 3 * time.Second
	for i, test := range []struct {
		mode string
		end  func(f *fixture)
		long time.Duration // that the end may take
	}{
		{"pings", func(f *fixture) { f.stop(grace) }, grace},
		{"streams", func(f *fixture) { f.stop(0) }, 0},
		{"deaf", func(f *fixture) { f.stop(grace) }, grace},
		{"noise", nil, 12 * time.Second}, // by its time to live, and the grace after that
	} {
		t.Run(test.mode, func(t *testing.T) {
			f := first
			if i > 0 {
				f = newRealFixture(t)
			}
			f.opts.Spec.VMM.Initrd = initrd
			f.opts.Spec.VMM.BootArgs += " hostile=" + test.mode
			if test.end == nil {
				f.opts.Spec.TTL = 2 * time.Second
			}
			launched := f.launch()
			began := time.Now()
			if launched.Answer.Version != test.mode {
				t.Fatalf("another agent answers: %+v", launched.Answer)
			}
			if test.mode == "deaf" {
				fillAgent(t, f)
			} else {
				awaitSessionEnd(t, f)
			}
			if peak := peakMemory(t, launched.PID); peak > maxShim {
				t.Errorf("the shim has come to use %d MiB", peak>>20)
			}
			if test.end != nil {
				began = time.Now()
				test.end(f)
			}
			record := f.end(launched)
			if took := time.Since(began); took > test.long+10*time.Second {
				t.Errorf("it took %s to end, %s were allowed", took, test.long)
			}
			if record.Exit.Reason != vmm.ExitKilled {
				t.Errorf("exit record is %+v", record)
			}
		})
	}
}

// awaitSessionEnd returns when the shim has given the guest's agent up.
func awaitSessionEnd(t *testing.T, f *fixture) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		conn, err := f.client().DialAgent(t.Context())
		if err != nil {
			return // the VM has ended meanwhile
		}
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
		text := make([]byte, 200)
		n, _ := conn.Read(text)
		_ = conn.Close()
		if strings.Contains(string(text[:n]), "does not answer any more") {
			return
		}
	}
	t.Error("the session with the hostile guest goes on")
}

// fillAgent sends a guest that does not read more than fits on the way.
func fillAgent(t *testing.T, f *fixture) {
	t.Helper()
	client := shim.NewClient(f.opts.Spec.RuntimeDir)
	for range 8 {
		conn, err := client.DialAgent(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_ = conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		_, _ = conn.Write(make([]byte, 1<<20))
	}
}
