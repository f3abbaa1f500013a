package dockerfile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociconfig"
)

// bases are the images that the tests' Dockerfiles are based on.
func bases(_ context.Context, name string) (Config, error) {
	config := emptyConfig("amd64")
	switch name {
	case "base":
		config.Config.Env = []string{"PATH=/bin", "BASE=1"}
		config.Config.Cmd = []string{"/bin/base"}
		config.Config.WorkingDir = "/home"
		config.Config.User = "app"
	case "plain":
	case "triggers":
		config.Config.OnBuild = []string{"COPY . /src", "RUN make $BASE"}
	case "bad-triggers":
		config.Config.OnBuild = []string{"FROM x"}
	default:
		return Config{}, fmt.Errorf("there is no image %q", name)
	}
	return config, nil
}

func plan(t testing.TB, text string, change ...func(*Options)) (*Plan, error) {
	t.Helper()
	opts := Options{Name: "Dockerfile", Arch: "amd64", Base: bases}
	for _, c := range change {
		c(&opts)
	}
	return New(t.Context(), []byte(text), opts)
}

func withArgs(pairs ...string) func(*Options) {
	return func(o *Options) {
		o.Args = map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			o.Args[pairs[i]] = pairs[i+1]
		}
	}
}

func withTarget(name string) func(*Options) { return func(o *Options) { o.Target = name } }

// show writes a source short.
func (s Source) show() string {
	switch {
	case s.Scratch:
		return "scratch"
	case s.Image != "":
		return "image:" + s.Image
	case s.Stage != nil:
		return "stage:" + s.Stage.Name
	}
	return "context"
}

// show writes the steps of a plan short, one a line.
func show(p *Plan) []string {
	var lines []string
	for _, stage := range p.Stages {
		lines = append(lines, fmt.Sprintf("%d %s FROM %s", stage.Line, stage.Name, stage.Base.show()))
		for _, step := range stage.Steps {
			line := fmt.Sprintf("%d ", step.Line)
			switch op := step.Op.(type) {
			case *Run:
				line += fmt.Sprintf("run %q in %s", op.Args, op.Dir)
				if op.User != "" {
					line += " as " + op.User
				}
				for _, m := range op.Mounts {
					line += fmt.Sprintf(" %s:%s<%s/%s", m.Type, m.Target, m.From.show(), m.Path)
				}
				if op.NoNetwork {
					line += " alone"
				}
			case *Copy:
				line += fmt.Sprintf("copy %s:%q to %s", op.From.show(), op.Paths, op.Dest)
				for _, f := range op.Files {
					line += fmt.Sprintf(" %s=%q", f.Name, f.Content)
				}
				if op.Owner+op.Mode != "" {
					line += fmt.Sprintf(" %s %s", op.Owner, op.Mode)
				}
				if op.Unpack {
					line += " unpack"
				}
			case *Mkdir:
				line += strings.TrimSuffix(fmt.Sprintf("mkdir %s of %s", op.Path, op.Owner), " of ")
			default:
				continue
			}
			lines = append(lines, line)
		}
	}
	return lines
}

func TestPlan(t *testing.T) {
	for _, test := range []struct {
		name, text string
		with       []func(*Options)
		want       []string
	}{
		{name: "shell and exec", text: "FROM plain\nRUN echo a  b && \\\n  c\nRUN [\"a\", \"b c\"]\nRUN [not json]", want: []string{
			"1 stage-0 FROM image:plain", `2 run ["/bin/sh" "-c" "echo a  b &&   c"] in /`, `4 run ["a" "b c"] in /`, `5 run ["/bin/sh" "-c" "[not json]"] in /`}},
		{name: "configuration of the base", text: "FROM base\nRUN x\nWORKDIR sub\nRUN y\nUSER root\nWORKDIR /abs/../other\nRUN z", want: []string{
			"1 stage-0 FROM image:base", `2 run ["/bin/sh" "-c" "x"] in /home as app`, "3 mkdir /home/sub of app", `4 run ["/bin/sh" "-c" "y"] in /home/sub as app`,
			"6 mkdir /other of root", `7 run ["/bin/sh" "-c" "z"] in /other as root`}},
		{name: "the root is there", text: "FROM plain\nWORKDIR /", want: []string{"1 stage-0 FROM image:plain"}},
		{name: "shell", text: "FROM plain\nSHELL [\"/bin/bash\", \"-ec\"]\nRUN x", want: []string{"1 stage-0 FROM image:plain", `3 run ["/bin/bash" "-ec" "x"] in /`}},
		{name: "only what is needed", text: "FROM plain AS a\nRUN a\nFROM plain AS b\nRUN b\nFROM nowhere AS c\nFROM scratch\nCOPY --from=a /x /y", want: []string{
			"1 a FROM image:plain", `2 run ["/bin/sh" "-c" "a"] in /`, "6 stage-3 FROM scratch", `7 copy stage:a:["x"] to /y`}},
		{name: "target", text: "FROM plain AS a\nRUN a\nFROM a AS b\nRUN b\nFROM b AS c\nRUN c", with: []func(*Options){withTarget("B")}, want: []string{
			"1 a FROM image:plain", `2 run ["/bin/sh" "-c" "a"] in /`, "3 b FROM stage:a", `4 run ["/bin/sh" "-c" "b"] in /`}},
		{name: "target by number", text: "FROM plain\nFROM plain\nRUN b", with: []func(*Options){withTarget("0")}, want: []string{"1 stage-0 FROM image:plain"}},
		{name: "stages by number and in turn", text: "FROM plain AS a\nFROM a\nWORKDIR /w\nFROM a\nCOPY --from=1 . .\nRUN --mount=from=a,target=m x", want: []string{
			"1 a FROM image:plain", "2 stage-1 FROM stage:a", "3 mkdir /w", "4 stage-2 FROM stage:a", `5 copy stage:stage-1:[""] to /`, `6 run ["/bin/sh" "-c" "x"] in / bind:/m<stage:a/`}},
		{name: "a stage hides an image", text: "FROM scratch AS base\nFROM base\nFROM BASE", want: []string{"1 base FROM scratch", "3 stage-2 FROM stage:base"}},
		{name: "copy from images", text: "FROM scratch\nCOPY --from=docker.io/library/x:1 /bin/x /\nCOPY --from=scratch . /", want: []string{
			"1 stage-0 FROM scratch", `2 copy image:docker.io/library/x:1:["bin/x"] to /`, `3 copy scratch:[""] to /`}},
		{name: "arguments before FROM", text: "ARG V=lain\nARG W=p${V}\nFROM ${W}\nARG V\nRUN $V\nCOPY $V-$W /", want: []string{
			"3 stage-0 FROM image:plain", `5 run ["/bin/sh" "-c" "$V"] in /`, `6 copy context:["lain-"] to /`}},
		{name: "build arguments", text: "ARG V=x\nFROM $V", with: []func(*Options){withArgs("V", "plain")}, want: []string{"2 stage-0 FROM image:plain"}},
		{name: "forms of expansion", text: "FROM plain\nENV a=1 e= q='$a' r=\"$a b\" p=abcabc\nCOPY ${a:-x} ${e:-x} k${e-x} ${u:-x} ${a:+y} k${u:+y} ${e+y} \\$a ${p#*b} ${p%b*} ${p/b/_} ${p//b/_} $q /d/", want: []string{
			"1 stage-0 FROM image:plain", `3 copy context:["1" "x" "k" "x" "y" "k" "y" "$a" "cabc" "abca" "a_cabc" "a_ca_c" "$a"] to /d/`}},
		{name: "escape", text: "# escape=`\nFROM plain\nCOPY a `\n  b /c/", want: []string{"2 stage-0 FROM image:plain", `3 copy context:["a" "b"] to /c/`}},
		{name: "destinations", text: "FROM plain\nWORKDIR /w\nCOPY a b\nCOPY a b/\nCOPY a .\nCOPY a ./\nCOPY a ..\nCOPY a /x/../y/.\nCOPY [\"a b\", \"/c d\"]", want: []string{
			"1 stage-0 FROM image:plain", "2 mkdir /w", `3 copy context:["a"] to /w/b`, `4 copy context:["a"] to /w/b/`, `5 copy context:["a"] to /w/`, `6 copy context:["a"] to /w/`,
			`7 copy context:["a"] to /`, `8 copy context:["a"] to /y/`, `9 copy context:["a b"] to /c d`}},
		{name: "sources stay below the root", text: "FROM plain\nCOPY ../../a /etc/./b/../c . /d/", want: []string{"1 stage-0 FROM image:plain", `2 copy context:["a" "etc/c" ""] to /d/`}},
		{name: "owners and modes", text: "FROM plain\nARG U=u\nCOPY --chown=$U:g --chmod=0755 --link a /\nADD --chmod=u=rwX,go=rX --unpack=false a.tar /\nADD a.tar /", want: []string{
			"1 stage-0 FROM image:plain", `3 copy context:["a"] to / u:g 0755`, `4 copy context:["a.tar"] to /  u=rwX,go=rX`, `5 copy context:["a.tar"] to / unpack`}},
		{name: "heredocs", text: "FROM plain\nENV a=1\nRUN <<E\necho $a\nE\nRUN <<E python3\nprint()\nE\nRUN <<-E\n\t#!/x\n\ty\nE\nCOPY <<E <<\"F\" b /d/\n$a\n\nE\n$a\nF", want: []string{
			"1 stage-0 FROM image:plain", `3 run ["/bin/sh" "-c" "echo $a\n"] in /`, `6 run ["/bin/sh" "-c" "<<E python3\nprint()\nE"] in /`,
			`9 run ["/bin/sh" "-c" "/dev/pipes/E"] in / bind:/dev/pipes<scratch/`, `13 copy context:["b"] to /d/ E="1\n\n" F="$a\n"`}},
		{name: "mounts", text: "FROM plain\nENV d=/cache\nWORKDIR /w\nRUN --mount=type=cache,target=$d --mount=type=secret,id=s --mount=type=secret,id=t,target=f --mount=type=secret,id=u,env=U --mount=type=tmpfs,dst=/t --mount=target=. --mount=from=other,src=/bin,dst=/o --network=none x", want: []string{
			"1 stage-0 FROM image:plain", "3 mkdir /w", `4 run ["/bin/sh" "-c" "x"] in /w cache:/cache<scratch/ secret:/run/secrets/s<scratch/ secret:/w/f<scratch/ secret:<scratch/ tmpfs:/t<scratch/ bind:/w<context/ bind:/o<image:other/bin alone`}},
		{name: "ONBUILD of an image", text: "FROM triggers\nENV BASE=2\nRUN x", want: []string{
			"1 stage-0 FROM image:triggers", `1 copy context:["."] to /src`, `1 run ["/bin/sh" "-c" "make $BASE"] in /`, `3 run ["/bin/sh" "-c" "x"] in /`}},
		{name: "ONBUILD of a stage", text: "FROM plain AS a\nONBUILD RUN t\nRUN a\nFROM a AS b\nRUN b\nFROM b\nRUN c", want: []string{
			"1 a FROM image:plain", `3 run ["/bin/sh" "-c" "a"] in /`, "4 b FROM stage:a", `4 run ["/bin/sh" "-c" "t"] in /`, `5 run ["/bin/sh" "-c" "b"] in /`,
			"6 stage-2 FROM stage:b", `7 run ["/bin/sh" "-c" "c"] in /`}},
		{name: "platforms that fit", text: "FROM --platform=$BUILDPLATFORM plain\nFROM --platform=linux/x86_64 plain\nFROM --platform=linux plain\nFROM --platform=amd64 plain", want: []string{"4 stage-3 FROM image:plain"}},
		{name: "lower case and syntax", text: "# syntax=docker/dockerfile:1.7\nfrom plain as a\nrun x", want: []string{"2 a FROM image:plain", `3 run ["/bin/sh" "-c" "x"] in /`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := plan(t, test.text, test.with...)
			if err != nil {
				t.Fatal(err)
			}
			want := test.want
			for i := range want { // a path that is empty is the root
				want[i] = strings.ReplaceAll(want[i], `["."]`, `[""]`)
			}
			if diff := cmp.Diff(want, show(p)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestConfig(t *testing.T) {
	base := "PATH=/bin"
	for _, test := range []struct {
		name, text string
		check      func(Config) any
		want       any
	}{
		{"the base's command", "FROM base\nRUN x", func(c Config) any { return c.Config.Cmd }, []string{"/bin/base"}},
		{"an entrypoint resets it", "FROM base\nENTRYPOINT [\"e\"]", func(c Config) any { return c.Config.Cmd }, []string(nil)},
		{"but not the Dockerfile's own", "FROM base\nCMD c\nENTRYPOINT [\"e\"]", func(c Config) any { return c.Config.Cmd }, []string{"/bin/sh", "-c", "c"}},
		{"one of a stage before is the base's", "FROM base AS a\nCMD c\nFROM a\nENTRYPOINT [\"e\"]", func(c Config) any { return c.Config.Cmd }, []string(nil)},
		{"entrypoint by the shell", "FROM base\nSHELL [\"s\"]\nENTRYPOINT exec $x", func(c Config) any { return c.Config.Entrypoint }, []string{"s", "exec $x"}},
		{"empty entrypoint", "FROM base\nENTRYPOINT []", func(c Config) any { return len(c.Config.Entrypoint) }, 0},
		{"environment", "FROM base\nENV A=1 B=$A BASE=2\nENV C=$A$BASE \\\n  D=\"x y\"\nENV E long value", func(c Config) any { return c.Config.Env }, []string{base, "BASE=2", "A=1", "B=", "C=12", "D=x y", "E=long value"}},
		{"arguments are not in the image", "FROM plain\nARG A=1\nENV B=${A}2", func(c Config) any { return c.Config.Env }, []string{"PATH=" + ociconfig.DefaultPath, "B=12"}},
		{"working directory", "FROM base\nWORKDIR a\nENV x=b\nWORKDIR $x", func(c Config) any { return c.Config.WorkingDir }, "/home/a/b"},
		{"user", "FROM base\nARG u=1000\nUSER $u:g", func(c Config) any { return c.Config.User }, "1000:g"},
		{"ports", "FROM base\nENV P=80\nEXPOSE $P 53/UDP 8000-8002/tcp", func(c Config) any { return slices.Sorted(keys(c.Config.ExposedPorts)) }, []string{"53/udp", "80/tcp", "8000/tcp", "8001/tcp", "8002/tcp"}},
		{"labels", "FROM base\nLABEL a=1 \"b c\"='$d'\nLABEL a=2", func(c Config) any { return c.Config.Labels }, map[string]string{"a": "2", "b c": "$d", "given": "yes"}},
		{"volumes", "FROM base\nVOLUME /a /b\nVOLUME [\"/c d\"]", func(c Config) any { return slices.Sorted(keys(c.Config.Volumes)) }, []string{"/a", "/b", "/c d"}},
		{"health", "FROM base\nHEALTHCHECK --interval=5s --start-interval=1s --retries=2 CMD x y", func(c Config) any { return fmt.Sprintf("%+v", *c.Config.Healthcheck) }, "{Test:[CMD-SHELL x y] Interval:5s Timeout:0s StartPeriod:0s StartInterval:1s Retries:2}"},
		{"no health", "FROM base\nHEALTHCHECK NONE", func(c Config) any { return c.Config.Healthcheck.Test }, []string{"NONE"}},
		{"signal", "FROM base\nSTOPSIGNAL SIGQUIT", func(c Config) any { return c.Config.StopSignal }, "SIGQUIT"},
		{"author", "FROM base\nMAINTAINER me", func(c Config) any { return c.Author }, "me"},
		{"what others have to do", "FROM triggers\nONBUILD RUN x\nONBUILD COPY <<E /e\nhi\nE", func(c Config) any { return c.Config.OnBuild }, []string{"RUN x", "COPY <<E /e\nhi\nE"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := plan(t, test.text, func(o *Options) {
				if test.name == "labels" {
					o.Labels = map[string]string{"given": "yes"}
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, test.check(p.Target().Config)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func keys(m map[string]struct{}) func(func(string) bool) {
	return func(yield func(string) bool) {
		for key := range m {
			if !yield(key) {
				return
			}
		}
	}
}

// The history is as docker writes it.
func TestHistory(t *testing.T) {
	p, err := plan(t, `FROM base
ARG A=1 B
ENV x=1 y=2
WORKDIR /w
RUN echo $A
RUN ["a", "b"]
COPY --chown=1:2 --chmod=600 a <<E b/
hi
E
ADD a.tar /
EXPOSE 80
VOLUME /v
USER u
LABEL l=1
STOPSIGNAL 9
SHELL ["/bin/bash", "-c"]
CMD x
ENTRYPOINT ["e", "f"]
HEALTHCHECK CMD y
ONBUILD RUN z
`, withArgs("B", "2"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, step := range p.Target().Steps {
		got = append(got, step.History)
	}
	want := []string{
		"ARG A=1 B=2", "ENV x=1 y=2", "WORKDIR /w", "RUN |2 A=1 B=2 /bin/sh -c echo $A # buildkit", "RUN |2 A=1 B=2 a b # buildkit",
		"COPY --chown=1:2 --chmod=600 a <<E b/ # buildkit", "ADD a.tar / # buildkit", "EXPOSE [80/tcp]", "VOLUME [/v]", "USER u", "LABEL l=1", "STOPSIGNAL 9",
		"SHELL [/bin/bash -c]", `CMD ["/bin/bash" "-c" "x"]`, `ENTRYPOINT ["e" "f"]`, "HEALTHCHECK {Test:[CMD-SHELL y] Interval:0s Timeout:0s StartPeriod:0s StartInterval:0s Retries:0}",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// What a command sees of arguments follows their scope.
func TestScope(t *testing.T) {
	p, err := plan(t, `ARG G=global
FROM base AS one
RUN first
ARG G
ARG A=default
ARG B=default
ARG NONE
ENV B=env
RUN second
FROM one
ARG A=again
RUN third
`, withArgs("B", "given", "HTTP_PROXY", "http://proxy", "UNKNOWN", "x"))
	if err != nil {
		t.Fatal(err)
	}
	var got [][]string
	for _, stage := range p.Stages {
		for _, step := range stage.Steps {
			if run, ok := step.Op.(*Run); ok {
				got = append(got, run.Env)
				if diff := cmp.Diff([]string{"HTTP_PROXY=http://proxy"}, run.Proxy); diff != "" {
					t.Error(diff)
				}
			}
		}
	}
	want := [][]string{
		{"PATH=/bin", "BASE=1"},
		{"PATH=/bin", "BASE=1", "G=global", "A=default", "B=env"},
		{"PATH=/bin", "BASE=1", "G=global", "A=again", "B=env"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if len(p.Warnings) != 1 || !strings.Contains(p.Warnings[0].Text, "UNKNOWN") {
		t.Errorf("warned of %+v", p.Warnings)
	}
}

func TestErrors(t *testing.T) {
	long := strings.Repeat("x", 60_000)
	for _, test := range []struct {
		name, text string
		with       []func(*Options)
		want       string // the beginning; with what is behind … somewhere in it
	}{
		{name: "nothing", text: "", want: "Dockerfile: file with no instructions"},
		{name: "only comments", text: "# x\n\n", want: "Dockerfile:2: file with no instructions"},
		{name: "no stage", text: "ARG x", want: "Dockerfile: there is no FROM"},
		{name: "before FROM", text: "ARG x\nRUN x\nFROM plain", want: "Dockerfile:2: RUN comes before the first FROM"},
		{name: "unknown instruction", text: "FROM plain\n\nRUM x", want: "Dockerfile:3: unknown instruction: RUM (did you mean RUN?)"},
		{name: "unknown flag", text: "FROM plain\nCOPY --form=x a b", want: "Dockerfile:2: unknown flag: --form"},
		{name: "behind a continuation", text: "FROM plain\nRUN a \\\n  b \\\n  c\nCOPY a", want: "Dockerfile:5: COPY requires at least two arguments"},
		{name: "open heredoc", text: "FROM plain\nRUN <<E\nx", want: "Dockerfile:2: unterminated heredoc"},
		{name: "long line", text: "FROM plain\nRUN " + long + long, want: "Dockerfile:1: …line"},
		{name: "too long", text: strings.Repeat("#\n", MaxSize), want: "Dockerfile: it has"},
		{name: "no image", text: "FROM plain AS a\nFROM nowhere\nCOPY --from=a a b", want: "Dockerfile:2: FROM nowhere: there is no image"},
		{name: "two of one name", text: "FROM plain AS a\nFROM plain AS A", want: "Dockerfile:2: there are two stages of the name \"a\": the other one is in line 1"},
		{name: "name of a stage", text: "FROM plain AS scratch", want: "Dockerfile:1: a stage can't have the name"},
		{name: "no base", text: "FROM $NONE", want: "Dockerfile:1: FROM $NONE: the name of the base is empty"},
		{name: "required argument", text: "FROM plain\nCOPY ${x:?needed} /", want: "Dockerfile:2: COPY: …needed"},
		{name: "unknown form", text: "FROM plain\nCOPY ${x:=1} /", want: "Dockerfile:2: COPY: …modifier"},
		{name: "no target", text: "FROM plain AS a\nFROM plain", with: []func(*Options){withTarget("c")}, want: "Dockerfile: there is no stage \"c\" to build; there are: a, stage-1"},
		{name: "number of no stage", text: "FROM plain\nCOPY --from=3 a b", want: "Dockerfile:2: COPY: --from=3: there is no stage of that number"},
		{name: "itself", text: "FROM plain AS a\nCOPY --from=a a b", want: "Dockerfile:2: COPY: --from=a: this is stage a"},
		{name: "later stage", text: "FROM plain AS a\nCOPY --from=b a b\nFROM plain AS b\nFROM a", want: "Dockerfile:2: COPY: --from=b: that stage comes later, in line 3"},
		{name: "variable in from", text: "FROM plain\nCOPY --from=$x a b", want: "Dockerfile:2: COPY: --from=$x: it can't have variables"},
		{name: "no command", text: "FROM plain\nRUN", want: "Dockerfile:2: RUN: there is no command"},
		{name: "empty exec form", text: "FROM plain\nRUN []", want: "Dockerfile:2: RUN: there is no command"},
		{name: "mode", text: "FROM plain\nCOPY --chmod=99999 a b", want: "Dockerfile:2: COPY: --chmod=99999"},
		{name: "high mode", text: "FROM plain\nCOPY --chmod=17777 a b", want: "Dockerfile:2: COPY: --chmod=17777: it is above 7777"},
		{name: "owner", text: "FROM plain\nCOPY --chown=a:b:c a b", want: "Dockerfile:2: COPY: --chown: user"},
		{name: "user", text: "FROM plain\nUSER a:b:c", want: "Dockerfile:2: USER: user"},
		{name: "port", text: "FROM plain\nEXPOSE 99999", want: "Dockerfile:2: EXPOSE: port"},
		{name: "many ports", text: "FROM plain\nEXPOSE 1-65535", want: "Dockerfile:2: EXPOSE: port"},
		{name: "published port", text: "FROM plain\nEXPOSE 8080:80", want: "Dockerfile:2: EXPOSE: port \"8080:80\": an image says only"},
		{name: "signal", text: "FROM plain\nSTOPSIGNAL SIGNONE", want: "Dockerfile:2: STOPSIGNAL: there is no signal"},
		{name: "volume", text: "FROM plain\nVOLUME data", want: "Dockerfile:2: VOLUME: \"data\" is no absolute path"},
		{name: "shell", text: "FROM plain\nSHELL bash", want: "Dockerfile:2: SHELL requires the arguments to be in JSON form"},
		{name: "health", text: "FROM plain\nHEALTHCHECK x", want: "Dockerfile:2: Unknown type"},
		{name: "trigger", text: "FROM plain\nONBUILD FROM x", want: "Dockerfile:2: FROM isn't allowed as an ONBUILD trigger"},
		{name: "trigger of a base", text: "FROM plain\nFROM bad-triggers", want: "Dockerfile:2: the base has ONBUILD"},
		{name: "mount's type", text: "FROM plain\nRUN --mount=type=cach,target=/x y", want: "Dockerfile:2: RUN: unsupported mount type \"cach\" (did you mean cache?)"},
		{name: "mount's target", text: "FROM plain\nRUN --mount=type=cache y", want: "Dockerfile:2: RUN: --mount=type=cache: it needs a target"},
		{name: "mount over all", text: "FROM plain\nRUN --mount=type=bind,target=/ y", want: "Dockerfile:2: RUN: --mount=type=bind: its target can't be /"},
		{name: "growth", text: "FROM plain\nENV a=" + long + "\nENV b=$a$a\nENV c=$b$b", want: "Dockerfile:4: …longer"},
		{name: "growth by replacement", text: "FROM plain\nENV a=" + long + "\nCOPY ${a//x/" + long[:1000] + "} /", want: "Dockerfile:3: COPY: …longer"},
		{name: "heredoc for no shell", text: "FROM plain\nCOPY a <<E\nE", want: "Dockerfile:2: COPY cannot accept a heredoc as a destination"},
		{name: "heredoc that leads out", text: "FROM plain\nCOPY <<../x /\n../x", want: "Dockerfile:2: COPY: a heredoc of the name"},
		// Not supported.
		{name: "platform", text: "FROM --platform=linux/riscv64 plain", want: "Dockerfile:1: FROM --platform=linux/riscv64 is not supported"},
		{name: "windows", text: "FROM --platform=windows/amd64 plain", want: "Dockerfile:1: FROM --platform=windows/amd64 is not supported"},
		{name: "syntax", text: "# syntax=example.com/my\nFROM plain", want: "Dockerfile:1: syntax \"example.com/my\" is not supported"},
		{name: "ssh", text: "FROM plain\nRUN --mount=type=ssh x", want: "Dockerfile:2: RUN: --mount=type=ssh: it is not supported"},
		{name: "security", text: "FROM plain\nRUN --security=insecure x", want: "Dockerfile:2: RUN: --security=insecure is not supported"},
		{name: "network", text: "FROM plain\nRUN --network=host x", want: "Dockerfile:2: RUN: --network=host is not supported"},
		{name: "device", text: "FROM plain\nRUN --device=a x", want: "Dockerfile:2: …device"},
		{name: "parents", text: "FROM plain\nCOPY --parents a b", want: "Dockerfile:2: COPY: --parents is not supported"},
		{name: "URL", text: "FROM plain\nADD https://example.com/x /", want: "Dockerfile:2: ADD: the URL \"https://example.com/x\" is not supported"},
		{name: "git", text: "FROM plain\nADD git@github.com:a/b.git /", want: "Dockerfile:2: ADD: the repository"},
		{name: "git by https", text: "FROM plain\nADD https://github.com/a/b.git#main /", want: "Dockerfile:2: ADD: the repository"},
		{name: "git's directory", text: "FROM plain\nADD --keep-git-dir=true a /", want: "Dockerfile:2: ADD: --keep-git-dir is not supported"},
		{name: "URL by COPY", text: "FROM plain\nCOPY https://example.com/x /", want: "Dockerfile:2: COPY: \"https://example.com/x\": COPY takes files only"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := plan(t, test.text, test.with...)
			if err == nil {
				t.Fatalf("planned %q", show(p))
			}
			begin, part, _ := strings.Cut(test.want, "…")
			if text := err.Error(); !strings.HasPrefix(text, begin) || !strings.Contains(text, part) {
				t.Errorf("error %.300q, want %q", text, test.want)
			}
			if _, ok := errors.AsType[*Error](err); !ok {
				t.Errorf("%T", err)
			}
			if strings.Contains(test.want, "is not supported") && !errors.Is(err, smolvm.ErrUnsupported) {
				t.Errorf("%v is no refusal", err)
			}
		})
	}
}

// Signals have the names that docker knows.
func TestSignals(t *testing.T) {
	for text, want := range map[string]bool{"9": true, "SIGTERM": true, "term": true, "SIGRTMIN+3": true, "RTMAX-2": true, "RTMIN+x": false, "0": false, "65": false, "": false, "SIG": false} {
		if err := checkSignal(text); (err == nil) != want {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzPlan(f *testing.F) {
	for _, seed := range []string{
		"FROM base AS a\nARG x=1\nENV y=${x:-z}\nRUN --mount=type=cache,target=/c echo $y\nFROM a\nCOPY --from=a /x /y\n",
		"# escape=`\nFROM triggers\nRUN <<E\nx\nE\nCOPY <<F /\n$x\nF\nHEALTHCHECK CMD x\nEXPOSE 1-5\n",
		"ARG b=base\nFROM ${b}\nONBUILD RUN x\nVOLUME [\"/a\"]\nSHELL [\"a\"]\nUSER a:b\nWORKDIR ../x\nSTOPSIGNAL RTMIN+1\nADD --chown=1 a* /b/\n",
		"FROM scratch\nENV a=b\nENV c=${a//b/${a}}\nLABEL x=\"$c\"\nCMD [\"x\"]\nENTRYPOINT y\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := plan(t, text)
		if err != nil {
			if at := (*Error)(nil); !errors.As(err, &at) || at.File != "Dockerfile" {
				t.Errorf("error %v has no place", err)
			}
			return
		}
		seen := map[*Stage]bool{}
		for _, stage := range p.Stages {
			for _, step := range stage.Steps {
				checkStep(t, step, seen)
			}
			if base := stage.Base.Stage; base != nil && !seen[base] {
				t.Errorf("stage %s is based on one that comes later", stage.Name)
			}
			seen[stage] = true
		}
	})
}

// checkStep checks what who does a step relies on.
func checkStep(t *testing.T, step Step, seen map[*Stage]bool) {
	absolute := func(name string) bool {
		return strings.HasPrefix(name, "/") && !strings.Contains(name, "/../") && !strings.Contains(name, "\x00")
	}
	known := func(s Source) bool { return s.Stage == nil || seen[s.Stage] }
	switch op := step.Op.(type) {
	case *Run:
		for _, m := range op.Mounts {
			if m.Target != "" && !absolute(m.Target) || !known(m.From) {
				t.Errorf("mount %+v", m)
			}
		}
		if len(op.Args) == 0 || !absolute(op.Dir) {
			t.Errorf("run %+v", op)
		}
	case *Copy:
		if !absolute(op.Dest) || !known(op.From) || len(op.Paths)+len(op.Files) == 0 {
			t.Errorf("copy %+v", op)
		}
		for _, name := range op.Paths {
			if strings.HasPrefix(name, "/") || strings.HasPrefix(name, "../") || name == ".." || strings.Contains(name, "\x00") {
				t.Errorf("copy of %q", name)
			}
		}
	case *Mkdir:
		if !absolute(op.Path) {
			t.Errorf("directory %q", op.Path)
		}
	}
}
