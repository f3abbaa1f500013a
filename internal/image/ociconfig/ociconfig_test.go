package ociconfig

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// document returns a configuration's document, of the text of its part "config".
func document(config string) []byte {
	return []byte(`{"architecture":"amd64","os":"linux","config":` + config + `,"rootfs":{"type":"layers","diff_ids":[]}}`)
}

func mustParse(t *testing.T, config string) Config {
	t.Helper()
	parsed, err := Parse(document(config))
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

func TestParse(t *testing.T) {
	for _, test := range []struct {
		name, config string
		want         Config
	}{
		{"nothing", `{}`, Config{}},
		{"all", `{"Entrypoint":["/run"],"Cmd":["a","b"],"Env":["A=1","PATH=/x","A=2","=x","none"],"WorkingDir":"/srv","User":"www:33",
			"ExposedPorts":{"8080/tcp":{},"53/UDP":{},"80":{},"90-92/tcp":{},"80/tcp":{}},"StopSignal":"SIGINT","Labels":{"k":"v"},
			"Volumes":{"/z":{},"/a":{}},"Healthcheck":{"Test":["CMD-SHELL","curl -f x"],"Interval":5000000000,"Retries":2}}`,
			Config{Entrypoint: []string{"/run"}, Cmd: []string{"a", "b"}, Env: []string{"A=2", "PATH=/x"}, WorkingDir: "/srv", User: User{"www", "33"},
				Ports: []Port{{53, "udp"}, {80, "tcp"}, {90, "tcp"}, {91, "tcp"}, {92, "tcp"}, {8080, "tcp"}}, StopSignal: "SIGINT",
				Labels: map[string]string{"k": "v"}, Volumes: []string{"/a", "/z"},
				Healthcheck: &Healthcheck{Command: []string{"curl -f x"}, Shell: true, Interval: 5 * time.Second, Timeout: 30 * time.Second, StartInterval: 5 * time.Second, Retries: 2}}},
		{"no healthcheck", `{"Healthcheck":{"Test":["NONE"]}}`, Config{}},
		{"inherited healthcheck", `{"Healthcheck":{"Test":[]}}`, Config{}},
		{"healthcheck without shell", `{"Healthcheck":{"Test":["CMD","/check","-v"],"Timeout":1000000000,"StartPeriod":2000000000}}`,
			Config{Healthcheck: &Healthcheck{Command: []string{"/check", "-v"}, Interval: 30 * time.Second, Timeout: time.Second, StartPeriod: 2 * time.Second, StartInterval: 5 * time.Second, Retries: 3}}},
		{"group only", `{"User":":5"}`, Config{User: User{"", "5"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, mustParse(t, test.config)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	many, err := json.Marshal(make([]string, maxList+1))
	if err != nil {
		t.Fatal(err)
	}
	for config, want := range map[string]string{
		`[]`:                                                 "read",
		`{"User":"a:b:c"}`:                                   "user",
		`{"User":":"}`:                                       "user",
		`{"User":"99999999999"}`:                             "no id",
		`{"User":"99999999999999999999999"}`:                 "no id",
		`{"User":"-1"}`:                                      "no id",
		`{"User":"a\nb"}`:                                    "user",
		`{"User":"../x"}`:                                    "user",
		`{"ExposedPorts":{"0/tcp":{}}}`:                      "port",
		`{"ExposedPorts":{"70000":{}}}`:                      "port",
		`{"ExposedPorts":{"80/icmp":{}}}`:                    "port",
		`{"ExposedPorts":{"90-80/tcp":{}}}`:                  "port",
		`{"ExposedPorts":{"-1":{}}}`:                         "port",
		`{"ExposedPorts":{"":{}}}`:                           "port",
		`{"Volumes":{"relative":{}}}`:                        "volume",
		`{"Cmd":["a\u0000b"]}`:                               "NUL",
		`{"Env":["A=` + strings.Repeat("x", maxText) + `"]}`: "too many",
		`{"Cmd":` + string(many) + `}`:                       "too many",
		`{"Healthcheck":{"Test":["RUN","x"]}}`:               "RUN",
		`{"Healthcheck":{"Test":["CMD"]}}`:                   "no command",
		`{"Healthcheck":{"Test":["CMD-SHELL","a","b"]}}`:     "no command",
		`{"Healthcheck":{"Test":["CMD","x"],"Interval":-5}}`: "below zero",
		`{"Healthcheck":{"Test":["CMD","x"],"Retries":-1}}`:  "below zero",
	} {
		if parsed, err := Parse(document(config)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s is %+v (%v), want %q", config, parsed, err, want)
		}
	}
	if _, err := Parse([]byte("no JSON")); err == nil {
		t.Error("a configuration that is no JSON is read")
	}
}

// What docker runs, by what the image has and what is said on the command line; see
// https://docs.docker.com/reference/dockerfile, "Understand how CMD and ENTRYPOINT interact".
func TestCommand(t *testing.T) {
	list := func(text string) []string {
		if text == "" {
			return nil
		}
		return strings.Split(text, " ")
	}
	for _, test := range []struct {
		entrypoint, cmd string
		flag            []string // --entrypoint; nil if it is not given
		args, want      string
	}{
		{"", "", nil, "", ""},
		{"", "c d", nil, "", "c d"},
		{"e", "", nil, "", "e"},
		{"e f", "c d", nil, "", "e f c d"},
		{"", "c d", nil, "x y", "x y"},
		{"e", "", nil, "x", "e x"},
		{"e f", "c d", nil, "x y", "e f x y"},
		{"", "", nil, "x", "x"},
		{"e", "c", []string{"n"}, "", "n"},
		{"e", "c", []string{"n"}, "x", "n x"},
		{"", "c", []string{"n"}, "", "n"},
		{"e", "c", []string{""}, "", ""},
		{"e", "c", []string{""}, "x y", "x y"},
		{"e", "c", []string{"n", "m"}, "x", "n m x"},
		{"e", "c", []string{}, "", ""},
	} {
		config, err := Config{Entrypoint: list(test.entrypoint), Cmd: list(test.cmd)}.With(Flags{Entrypoint: test.flag, Args: list(test.args)})
		if err != nil {
			t.Fatal(err)
		}
		got, err := config.Command()
		if strings.Join(got, " ") != test.want || (test.want == "") != errors.Is(err, ErrNoCommand) {
			t.Errorf("entrypoint %q, cmd %q, --entrypoint %q, arguments %q: %q (%v), want %q", test.entrypoint, test.cmd, test.flag, test.args, got, err, test.want)
		}
	}
}

func TestWith(t *testing.T) {
	const path = "PATH=" + DefaultPath
	image := Config{Env: []string{"A=1", "B=2"}, WorkingDir: "/srv", User: User{"www", "www"}, StopSignal: "SIGINT",
		Labels: map[string]string{"a": "1", "b": "2"}, Healthcheck: &Healthcheck{}}
	for _, test := range []struct {
		name  string
		flags Flags
		want  func(c *Config)
	}{
		{"nothing", Flags{}, func(c *Config) { c.Env = []string{path, "A=1", "B=2"} }},
		{"variables", Flags{Env: []string{"B=3", "C=", "A", "D", "C=4"}}, func(c *Config) { c.Env = []string{path, "B=3", "C=4"} }},
		{"removed, set again", Flags{Env: []string{"A", "A=5"}}, func(c *Config) { c.Env = []string{path, "B=2", "A=5"} }},
		{"path", Flags{Env: []string{"PATH=/x"}}, func(c *Config) { c.Env = []string{"A=1", "B=2", "PATH=/x"} }},
		{"no path", Flags{Env: []string{"PATH"}}, func(*Config) {}},
		{"directory", Flags{WorkingDir: "/x"}, func(c *Config) { c.Env, c.WorkingDir = []string{path, "A=1", "B=2"}, "/x" }},
		{"user", Flags{User: "5"}, func(c *Config) { c.Env, c.User = []string{path, "A=1", "B=2"}, User{"5", ""} }},
		{"signal", Flags{StopSignal: "9"}, func(c *Config) { c.Env, c.StopSignal = []string{path, "A=1", "B=2"}, "9" }},
		{"labels", Flags{Labels: map[string]string{"b": "3", "c": "4"}}, func(c *Config) {
			c.Env, c.Labels = []string{path, "A=1", "B=2"}, map[string]string{"a": "1", "b": "3", "c": "4"}
		}},
		{"no check", Flags{NoHealthcheck: true}, func(c *Config) { c.Env, c.Healthcheck = []string{path, "A=1", "B=2"}, nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := image.With(test.flags)
			if err != nil {
				t.Fatal(err)
			}
			want := image
			test.want(&want)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	if image.Labels["b"] != "2" || image.Env[0] != "A=1" {
		t.Errorf("the image's own configuration is changed: %+v", image)
	}
	for _, flags := range []Flags{{WorkingDir: "x"}, {User: "a:b:c"}, {Args: []string{"a\x00"}}, {Env: []string{"A=\x00"}}} {
		if got, err := image.With(flags); err == nil {
			t.Errorf("%+v is %+v", flags, got)
		}
	}
}

func TestDir(t *testing.T) {
	for dir, want := range map[string]string{"": "/", "/": "/", "/srv": "/srv", "srv": "/srv"} {
		if got := (Config{WorkingDir: dir}).Dir(); got != want {
			t.Errorf("%q is %q, want %q", dir, got, want)
		}
	}
	if text := (User{"a", "b"}).String() + (User{"a", ""}).String() + (Port{80, "tcp"}).String(); text != "a:ba80/tcp" {
		t.Error(text)
	}
}

// Whatever a configuration says, it is read or refused.
func FuzzParse(f *testing.F) {
	f.Add(document(`{"User":"a:1","ExposedPorts":{"1-2/udp":{}},"Env":["A=1"],"Healthcheck":{"Test":["CMD","x"]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		config, err := Parse(text)
		if err != nil {
			return
		}
		if _, err := config.With(Flags{Args: []string{"x"}}); err != nil {
			t.Errorf("%+v: %v", config, err)
		}
	})
}
