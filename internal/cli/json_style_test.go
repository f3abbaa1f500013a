package cli_test

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/imagetest"
)

// noData are the commands that print no data of their own with --json, with the reason.
// Every other command has to be run by TestJSONStyle.
func noData() map[string]string {
	const (
		group  = "it only has subcommands"
		stream = "its output is that of a program or a file"
		names  = "it prints the names that it was given"
		quiet  = "it prints nothing"
	)
	return map[string]string{
		"": group, "port": group, "policy": group, "snapshot": group, "image": group, "template": group, "pool": group,
		"run": stream, "exec": stream, "shell": stream, "cp": stream, "logs": stream, "completion": stream,
		"image kernel": "it builds for a quarter of an hour; what it prints is checked as it is",
		"image push":   quiet, "image tag": quiet, "image export": stream,
		"rm": names, "port rm": names, "snapshot rm": names, "image rm": names, "template rm": names, "pool rm": names,
	}
}

// TestJSONStyle runs each command that prints JSON, and holds what it prints to
// docs/json.md. One VM serves for all.
func TestJSONStyle(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	kernel, initrd := filepath.Join(h.dir, "vmlinux"), filepath.Join(h.dir, "initrd")
	err := errors.Join(
		os.WriteFile(kernel, imagetest.TinyKernel(), 0o600),
		os.WriteFile(initrd, []byte("070701 is how a cpio archive begins\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	style := newStyle(t)
	ran := map[string]bool{}
	run := func(command string, args ...string) {
		t.Helper()
		ran[command] = true
		line := append(append(strings.Fields(command), "--json"), args...)
		cmd := h.command(line...)
		cmd.Stderr = t.Output()
		out, err := cmd.Output()
		var exit *exec.ExitError
		if err != nil && (!errors.As(err, &exit) || command != "doctor") { // whose status is the host's
			t.Fatalf("smolvm %q: %v", line, err)
		}
		style.stream(command, string(out))
	}

	// Nothing is there: lists are empty, and not null.
	for _, command := range []string{"ls", "image ls", "events", "reconcile", "snapshot ls", "template ls", "pool ls", "image prune"} {
		run(command)
	}
	run("version")
	run("doctor")

	// All that can be asked for.
	run("create", "--name", "own", "--kernel", kernel, "--initrd", initrd, "--ttl", "90s", "-e", "A_b=1", "-l", "x/y.z=1", "-p", "8099/udp", "--disk-mode", "isolated")
	run("create", "--name", "web", "--memory", "256M", "--ttl", "1h", "-v", t.TempDir()+":/project:overlay")
	run("start", "web")
	run("port add", "web", "80")
	run("policy set", "web", "--egress", "deny", "--allow", "example.com:443")
	run("policy show", "web")
	run("policy test", "web", "example.com:443")
	run("flows", "web")
	run("policy learn", "web")
	run("port ls", "web")
	run("ssh", "web")
	run("inspect", "web", "own")
	h.output("exec", "web", "--", "sh", "-c", "echo text > /project/new")
	run("diff", "web")
	run("apply", "web")
	run("image commit", "web", "committed")
	run("pause", "web")
	run("resume", "web")
	run("snapshot create", "--name", "ready", "web")
	run("snapshot ls")
	run("fork", "--id", "child", "web")
	run("snapshot restore", "--id", "second", "ready")
	h.output("rm", "child", "second")
	h.output("snapshot", "rm", "ready")
	run("template build", "--memory", "256M")
	run("template ls")
	run("pool set", "--memory", "256M", "1")
	run("pool ls")
	endPools(t, h)
	run("template prune", "--all")
	run("stop", "web")
	run("resize", "--disk-size", "9G", "web")
	run("ls")
	run("events")
	run("image build")
	oci := pushed(t, "style")
	run("image pull", oci)
	run("image history", oci)
	h.output("image", "export", "-o", filepath.Join(h.dir, "oci.tar"), oci)
	run("image import", filepath.Join(h.dir, "oci.tar"))
	run("image ls")
	run("image inspect", "base")
	h.output("rm", "web", "own")
	h.output("image", "rm", "committed")
	removePulled(t, h)
	built, err := json.Marshal(smolvm.Kernel{Name: "linux-source-6.1 6.1.1-1 smolvm-123456789abc", CreatedAt: time.Now().UTC()})
	if err != nil {
		t.Fatal(err)
	}
	style.stream("image kernel", string(built))
	style.done()

	// Whatever command there is has been run, or has a reason.
	h.output("man", filepath.Join(h.dir, "man"))
	pages, err := filepath.Glob(filepath.Join(h.dir, "man", "*.1"))
	if err != nil || len(pages) == 0 {
		t.Fatalf("manual pages: %q, %v", pages, err)
	}
	reasons := noData()
	for _, page := range pages {
		name := strings.TrimSuffix(filepath.Base(page), ".1")
		command := strings.ReplaceAll(strings.TrimPrefix(strings.TrimPrefix(name, "smolvm"), "-"), "-", " ")
		if _, ok := reasons[command]; ok == ran[command] {
			t.Errorf("command %q: it must be either run with --json by this test, or listed with the reason why not", command)
		}
	}
}

func endPools(t *testing.T, h *host) {
	t.Helper()
	var pools []struct{ ID string }
	out := h.output("pool", "ls", "--json")
	if err := json.Unmarshal([]byte(out), &pools); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, pool := range pools {
		h.output("pool", "rm", pool.ID)
	}
}

// style collects what in JSON is not as docs/json.md says.
type style struct {
	t     *testing.T
	found map[string][]string // where, by problem
}

func newStyle(t *testing.T) *style { return &style{t, map[string][]string{}} }

// stream checks JSON values that follow one another.
func (s *style) stream(command, text string) {
	s.t.Helper()
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.UseNumber()
	values := 0
	for {
		var value any
		err := decoder.Decode(&value)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			s.t.Fatalf("smolvm %s prints no JSON: %v\n%s", command, err, text)
		}
		values++
		s.value(command, command, "", value)
	}
	if values == 0 {
		s.t.Errorf("smolvm %s printed nothing", command)
	}
}

func (s *style) bad(where, name, problem string) {
	key := name + ": " + problem
	s.found[key] = append(s.found[key], where)
}

// value checks a value and all in it. Its name is that of the field that it is in, of
// an array's elements that of the array.
func (s *style) value(command, where, name string, value any) {
	switch v := value.(type) {
	case nil:
		s.bad(where, name, "it is null")
	case []any:
		for _, element := range v {
			s.value(command, where+"[]", name, element)
		}
	case map[string]any:
		for key, inner := range v {
			if name != "labels" && name != "env" && !snake.MatchString(key) {
				s.bad(where, key, "it is not snake_case")
			}
			s.value(command, where+"."+key, key, inner)
		}
	case string:
		s.text(where, name, v)
	case json.Number:
		s.number(command, where, name, v.String())
	}
}

var (
	snake    = regexp.MustCompile(`^[a-z][a-z0-9]*(_[a-z0-9]+)*$`)
	otherMs  = regexp.MustCompile(`(^|_)(ns|us|s|sec|secs|seconds|minutes|hours|milliseconds|duration|pause|ttl|timeout|grace|uptime|elapsed|took)$|^ms$`)
	otherMiB = regexp.MustCompile(`(^|_)(size|memory|disk|kb|kib|mb|gb|gib|freed)$|^(bytes|mib)$`)
	integer  = regexp.MustCompile(`^[0-9]+$`)
	duration = regexp.MustCompile(`^[0-9]+(\.[0-9]{1,3})?$`)
	// enumeration matches the names of fields whose value is one of a few words.
	enumeration = regexp.MustCompile(`^(state|severity|protocol|mode|disk_mode|format|rootfs_format|method|start_method|ready|action|accelerator|backend)$`)
)

func (s *style) text(where, name, text string) {
	moment := name == "at" || strings.HasSuffix(name, "_at")
	at, err := time.Parse(time.RFC3339Nano, text)
	switch {
	case moment && err != nil:
		s.bad(where, name, "it is no time of RFC 3339")
	case err == nil && !moment:
		s.bad(where, name, "a time is named at, or ends in _at")
	case err == nil && !strings.HasSuffix(text, "Z"):
		s.bad(where, name, "it is not in UTC")
	case err == nil && at.IsZero():
		s.bad(where, name, "a time that there is not is left out")
	}
	if enumeration.MatchString(name) && (strings.ContainsAny(text, " \t") || strings.ToLower(text) != text) {
		s.bad(where, name, "a word of an enumeration has blanks")
	}
}

func (s *style) number(command, where, name, number string) {
	if name == "at" || strings.HasSuffix(name, "_at") {
		s.bad(where, name, "a time is a string")
	}
	isMs, isSize := strings.HasSuffix(name, "_ms"), strings.HasSuffix(name, "_bytes") || strings.HasSuffix(name, "_mib")
	switch {
	case otherMs.MatchString(name):
		s.bad(where, name, "a duration ends in _ms")
	case strings.HasPrefix(command, "pool") && name == "size": // a number of VMs
	case otherMiB.MatchString(name):
		s.bad(where, name, "a size ends in _bytes or _mib")
	}
	switch {
	case isMs && !duration.MatchString(number):
		s.bad(where, name, "it is no number with at most three decimals")
	case isSize && !integer.MatchString(number):
		s.bad(where, name, "it is no integer")
	}
}

// done reports what was found.
func (s *style) done() {
	s.t.Helper()
	for _, problem := range slices.Sorted(maps.Keys(s.found)) {
		s.t.Errorf("%s (docs/json.md), in %s", problem, strings.Join(slices.Compact(slices.Sorted(slices.Values(s.found[problem]))), ", "))
	}
}

// What breaks the style is found.
func TestJSONStyleFinds(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"Name":1}`:                              "Name: it is not snake_case",
		`{"a-b":1}`:                               "a-b: it is not snake_case",
		`{"labels":{"A-b":"x"}}`:                  "",
		`[{"names":null}]`:                        "names: it is null",
		`{"at":"2026-11-25T04:21:13+01:00"}`:      "at: it is not in UTC",
		`{"created_at":1764044473}`:               "created_at: a time is a string",
		`{"used_at":"yesterday"}`:                 "used_at: it is no time of RFC 3339",
		`{"used_at":"0001-01-01T00:00:00Z"}`:      "used_at: a time that there is not is left out",
		`{"when":"2026-11-25T04:21:13.25Z"}`:      "when: a time is named at, or ends in _at",
		`{"at":"2026-11-25T04:21:13.25Z"}`:        "",
		`{"duration_ms":1.5}`:                     "",
		`{"duration_ms":1.0625}`:                  "duration_ms: it is no number with at most three decimals",
		`{"duration_ms":-1}`:                      "duration_ms: it is no number with at most three decimals",
		`{"duration_ms":15}`:                      "",
		`{"pause_ns":1}`:                          "pause_ns: a duration ends in _ms",
		`{"timeout":1}`:                           "timeout: a duration ends in _ms",
		`{"size":1}`:                              "size: a size ends in _bytes or _mib",
		`{"size_bytes":1e3}`:                      "size_bytes: it is no integer",
		`{"memory_mib":512,"vcpus":2,"cpus":0.5}`: "",
		`{"method":"cold boot"}`:                  "method: a word of an enumeration has blanks",
	} {
		s := newStyle(t)
		s.stream("ls", text)
		if got := strings.Join(slices.Sorted(maps.Keys(s.found)), "; "); got != want {
			t.Errorf("%s: found %q, want %q", text, got, want)
		}
	}
}
