package manager

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
)

// A program that is no worker is not waited for without end, nor taken for one that has
// succeeded; a worker that has begun has all the time it needs.
func TestWorkerResult(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		script string // with its reports on descriptor 3
		limit  time.Duration
		id     string
		text   string // in the error
		hinted bool
	}{
		"says nothing":       {script: "exec sleep 1000", limit: 50 * time.Millisecond, text: "no answer within 50ms", hinted: true},
		"ends without words": {script: "exit 0", limit: time.Minute, text: "without a report", hinted: true},
		"fails":              {script: "exit 3", limit: time.Minute, text: "exit status 3"},
		"talks of something else": {script: "echo hello >&3", limit: time.Minute,
			text: "without a report", hinted: true},
		"talks, and goes on": {script: "echo hello >&3; exec sleep 1000", limit: 5 * time.Second,
			text: "signal: killed"},
		"reports":             {script: `echo '{"id":"x"}' >&3`, limit: time.Minute, id: "x"},
		"has begun, and ends": {script: `echo '{"started":true}' >&3; echo '{"id":"x"}' >&3`, limit: time.Minute, id: "x"},
		"has begun, and fails": {script: `echo '{"started":true}' >&3; echo '{"error":{"message":"no luck"}}' >&3; exit 1`,
			limit: time.Minute, text: "no luck"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reports, theirs, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("/bin/sh", "-c", test.script)
			cmd.ExtraFiles = []*os.File{theirs}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			_ = theirs.Close()
			got, err := (&worker{cmd: cmd, reports: reports}).result(test.limit)
			if cmd.ProcessState == nil {
				t.Error("the process is left behind")
			}
			if test.text == "" && err == nil && got.ID == test.id {
				return
			}
			if err == nil || test.text == "" || !strings.Contains(err.Error(), test.text) {
				t.Errorf("result is %+v, %v; want id %q, or an error with %q", got, err, test.id, test.text)
			}
			if hinted := smolvm.HintOf(err) != ""; hinted != test.hinted {
				t.Errorf("the hint of %v is %q", err, smolvm.HintOf(err))
			}
		})
	}
}
