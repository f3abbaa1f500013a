package kvmtest

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

// listener is a [logger] that keeps what it is told.
type listener struct {
	*testing.T
	told []string
}

func (l *listener) Logf(format string, args ...any) {
	l.told = append(l.told, fmt.Sprintf(format, args...))
}

// A job runs again only after its machine broke, so often and no more, and the output is that of
// the last run. Tests that fail are not run again.
func TestUnbroken(t *testing.T) {
	t.Parallel()
	failed, broken := errors.New("tests fail"), errors.New("the machine is broken")
	for name, test := range map[string]struct {
		runs                   []error // whether each breaks the machine
		fails                  error
		wantFailed, wantBroken error
	}{
		"passes":             {runs: []error{nil}},
		"fails":              {runs: []error{nil}, fails: failed, wantFailed: failed},
		"breaks, and passes": {runs: []error{broken, nil}},
		"breaks, and fails":  {runs: []error{broken, nil}, fails: failed, wantFailed: failed},
		"breaks each time":   {runs: []error{broken, broken, broken}, fails: failed, wantFailed: failed, wantBroken: broken},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run := 0
			l := &listener{T: t}
			said, gotFailed, gotBroken := unbroken(l, func(out io.Writer) (error, error) {
				run++
				if run > len(test.runs) {
					t.Fatalf("there is a run %d", run)
				}
				_, err := fmt.Fprintf(out, "run %d", run)
				return errors.Join(test.fails, err), test.runs[run-1]
			})
			if want := fmt.Sprintf("run %d", len(test.runs)); string(said) != want {
				t.Errorf("the output is %q, want %q", said, want)
			}
			if !errors.Is(gotFailed, test.wantFailed) || !errors.Is(gotBroken, test.wantBroken) {
				t.Errorf("it ends with %v, %v, want %v, %v", gotFailed, gotBroken, test.wantFailed, test.wantBroken)
			}
			if len(l.told) != len(test.runs)-1 {
				t.Errorf("told %q", l.told)
			}
			for _, told := range l.told {
				if !strings.Contains(told, broken.Error()) {
					t.Errorf("told %q", told)
				}
			}
		})
	}
}

// What a kernel says when it breaks is told from what it says of a guest that is well.
func TestSignOfBreakage(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]bool{
		"": false,
		"[   16.568590] kvm [159]: vcpu0, guest rIP: 0xffffffff81073744 Unhandled WRMSR(0xc0010007) = 0xffff":                false,
		"[    3.766953] kvm: already loaded vendor module 'kvm_amd'":                                                         false,
		"[  176.396214] BUG: TASK stack guard page was hit at 000000006192fe20":                                              true,
		"[  176.408396] Kernel panic - not syncing: corrupted stack end detected inside scheduler":                           true,
		"[   30.129056] rcu: INFO: rcu_preempt self-detected stall on CPU":                                                   true,
		"[   39.166562] timeout[151]: segfault at 0 ip 00000000005635d9 sp 00007ffff0add810 error 4 in busybox[401000+1000]": true,
	} {
		console := "[    1.000000] Run /init as init process\n" + line + "\n[ 200.000000] the end\n"
		if got := signOfBreakage(console); (got != "") != want || want && got != line {
			t.Errorf("of %q: %q", line, got)
		}
	}
}
