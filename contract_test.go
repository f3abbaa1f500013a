package smolvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// All JSON has one style: names in snake case, durations as "_ms", no other unit of time.
func TestJSONStyle(t *testing.T) {
	when := time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)
	took := 1234567 * time.Nanosecond
	phases := []Phase{{Name: "boot", Duration: took}}
	for _, value := range []any{
		VMInfo{ID: "web", Config: VMConfig{ID: "web", TTL: time.Minute}, HostInfo: HostInfo{PID: 1, ShimPID: 2},
			Start: &StartReport{Method: StartBoot, Timeline: phases}, Timeline: phases, CreatedAt: when, StartedAt: when, StoppedAt: when},
		Snapshot{Name: "s", Pause: took, CreatedAt: when},
		Template{ID: "t", CreatedAt: when, UsedAt: when},
		Pool{ID: "p"}, Image{Digest: "d", CreatedAt: when}, Event{At: when, Duration: took},
		Forked{Pause: took}, ExitStatus{Code: 1}, Finding{Name: "kvm"}, BackendInfo{Name: "qemu"},
		Usage{CPUTime: took, Disk: &DiskUsage{}, Network: &NetworkUsage{}},
		SSHAccess{Args: []string{"ssh"}}, PortForward{}, Drive{}, Limits{},
	} {
		text, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		var decoded any
		if err := json.Unmarshal(text, &decoded); err != nil {
			t.Fatal(err)
		}
		eachName(decoded, func(name string, value any) {
			switch {
			case strings.ToLower(name) != name || strings.ContainsAny(name, "- "):
				t.Errorf("%T: %q is not in snake case", value, name)
			case strings.HasSuffix(name, "_ns") || name == "ms" || strings.HasSuffix(name, "_s"):
				t.Errorf("%s: durations are in fields that end in _ms", name)
			case strings.HasSuffix(name, "_ms"):
				if ms, ok := value.(float64); !ok || ms != 60000 && ms != 1.235 && ms != 0 {
					t.Errorf("%s is %v", name, value)
				}
			case strings.HasSuffix(name, "_at") || name == "at":
				if value != when.Format(time.RFC3339Nano) {
					t.Errorf("%s is %v", name, value)
				}
			}
		})
	}
}

// eachName calls do for every name in decoded JSON.
func eachName(value any, do func(name string, value any)) {
	switch v := value.(type) {
	case []any:
		for _, one := range v {
			eachName(one, do)
		}
	case map[string]any:
		for name, one := range v {
			do(name, one)
			eachName(one, do)
		}
	}
}

// What is encoded is decoded to the same value.
func TestJSONRoundTrip(t *testing.T) {
	took := 1500 * time.Microsecond
	for _, value := range []any{
		&VMConfig{ID: "web", VCPUs: 2, TTL: time.Minute, Labels: map[string]string{"a": "b"}, Env: map[string]string{"A": "1"}},
		&Snapshot{Name: "s", Pause: took, Size: 7}, &Event{ID: 3, VMID: "web", Duration: took},
		&Forked{Pause: took}, &Phase{Name: "boot", Duration: took}, &Usage{CPUTime: took, Memory: 5, Network: &NetworkUsage{Sent: 2}},
		&StartReport{Method: StartClone, Source: "t", Timeline: []Phase{{Name: "boot", Duration: took}}},
	} {
		text, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		got := reflect.New(reflect.TypeOf(value).Elem()).Interface()
		if err := json.Unmarshal(text, got); err != nil || !reflect.DeepEqual(got, value) {
			t.Errorf("%s\nbecomes %+v, want %+v (%v)", text, got, value, err)
		}
	}
}

// Rows of earlier versions have other names.
func TestOldJSON(t *testing.T) {
	var config VMConfig
	if err := json.Unmarshal([]byte(`{"vcpus":2,"ttl_ns":60000000000}`), &config); err != nil || config.TTL != time.Minute || config.VCPUs != 2 {
		t.Errorf("a configuration: %+v, %v", config, err)
	}
	for text, want := range map[string]StartMethod{
		`{"rung":"cold boot","timeline":[{"name":"boot","ms":2.5}]}`:       StartBoot,
		`{"rung":"clone","timeline":[{"name":"boot","ms":2.5}]}`:           StartClone,
		`{"method":"pool","timeline":[{"name":"boot","duration_ms":2.5}]}`: StartPool,
	} {
		var report StartReport
		err := json.Unmarshal([]byte(text), &report)
		if err != nil || report.Method != want || len(report.Timeline) != 1 || report.Timeline[0].Duration != 2500*time.Microsecond {
			t.Errorf("%s becomes %+v, %v", text, report, err)
		}
	}
}

// Every sentinel has a code of its own, and the code leads back to it.
func TestCodes(t *testing.T) {
	seen := map[Code]bool{}
	for _, row := range codes() {
		if seen[row.code] {
			t.Errorf("%s is there twice", row.code)
		}
		seen[row.code] = true
		wrapped := fmt.Errorf("do it: %w", row.sentinel)
		if got := CodeOf(wrapped); got != row.code || !errors.Is(&Error{Code: got}, row.sentinel) {
			t.Errorf("code of %v is %s, want %s", row.sentinel, got, row.code)
		}
	}
	for want, err := range map[Code]error{
		"":                 nil,
		CodeUnknown:        errors.New("what"),
		CodeInvalid:        fmt.Errorf("x: %w", &ValidationError{Fields: []FieldError{{Field: "id"}}}),
		CodePrerequisite:   &PrerequisiteError{},
		CodeNetwork:        &NetworkError{Err: errors.New("what")},
		CodePortInUse:      &NetworkError{Err: ErrPortInUse},
		CodeVMNotFound:     errors.Join(errors.New("first"), &Error{Err: ErrVMNotFound}),
		CodeSnapshotExists: &Error{Code: CodeSnapshotExists, Err: fs.ErrExist},
	} {
		if got := CodeOf(err); got != want {
			t.Errorf("code of %v is %q, want %q", err, got, want)
		}
	}
	if !errors.Is(&Error{Code: CodeVMNotFound}, ErrNotFound) || errors.Is(&Error{Code: CodeVMNotFound}, ErrPoolNotFound) {
		t.Error("an error with a code matches other sentinels than that of its code and those above it")
	}
}

func TestHint(t *testing.T) {
	hinted := &Error{Hint: "do this", Err: errors.New("it failed")}
	for _, err := range []error{
		hinted,
		fmt.Errorf("start: %w", hinted),
		&Error{Op: "start", Kind: "VM", ID: "web", Err: hinted},
		errors.Join(&Error{Op: "a", Err: errors.New("no hint")}, fmt.Errorf("%w, %w", errors.New("other"), hinted)),
	} {
		if HintOf(err) != "do this" || strings.Contains(err.Error(), "do this") {
			t.Errorf("hint of %q is %q", err, HintOf(err))
		}
	}
	if HintOf(nil) != "" || HintOf(errors.New("x")) != "" {
		t.Error("there are hints of nothing")
	}
	for want, err := range map[string]*Error{
		`start VM "web": boot timed out`: {Op: "start", Kind: "VM", ID: "web", Err: ErrBootTimeout},
		"prune images: boot timed out":   {Op: "prune images", Err: ErrBootTimeout},
		"VM not found":                   {Code: CodeVMNotFound},
	} {
		if err.Error() != want {
			t.Errorf("error is %q, want %q", err, want)
		}
	}
}

func TestDifferences(t *testing.T) {
	base := VMConfig{ID: "web", MemoryMiB: 512, Labels: map[string]string{"a": "b"}}.WithDefaults()
	other := base
	if got := base.Differences(other); got != nil {
		t.Errorf("equal configurations differ in %q", got)
	}
	other.MemoryMiB, other.TTL, other.Labels = 1024, time.Minute, nil
	if got, want := base.Differences(other), []string{"labels", "memory_mib", "ttl_ms"}; !slices.Equal(got, want) || !slices.Equal(other.Differences(base), want) {
		t.Errorf("they differ in %q, want %q", got, want)
	}
}

// chatty is a guest whose command writes for as long as it is let.
type chatty struct {
	Execs
	written int
}

func (c *chatty) Exec(ctx context.Context, _ string, command Command) (ExitStatus, error) {
	line := make([]byte, 1<<20)
	for ctx.Err() == nil {
		n, _ := command.Stdout.Write(line) // a command of a guest may not mind a broken pipe
		c.written += n
	}
	return ExitStatus{}, context.Cause(ctx)
}

// A guest can't fill the memory of the program that wants its output.
func TestOutputIsBounded(t *testing.T) {
	guest := &chatty{}
	result, err := capture(t.Context(), guest, "web", Command{Args: []string{"yes"}})
	if !errors.Is(err, ErrOutputLimit) || len(result.Stdout) > MaxOutput || guest.written > MaxOutput {
		t.Errorf("%d bytes were kept of %d: %v", len(result.Stdout), guest.written, err)
	}
}

func TestSSHAccessString(t *testing.T) {
	for word, want := range map[string]string{"": "''", "plain-1.0": "plain-1.0", "a b": "'a b'", "it's": `'it'\''s'`, "$x": "'$x'"} {
		if got := (SSHAccess{Args: []string{"ssh", word}}).String(); got != "ssh "+want {
			t.Errorf("%q is quoted as %s, want %s", word, got, want)
		}
	}
}
