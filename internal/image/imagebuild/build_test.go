package imagebuild

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
)

func TestCopy(t *testing.T) {
	context := map[string]string{
		"a": "A", "b.txt": "B", "d/x": "X", "d/sub/y": "Y", "d/link": "->x", "empty/": "", "up": "->../../../../etc/passwd", "abs": "->/a", "to-d": "->d",
		"c[1]": "C", "lib/l": "L", "here": "->.",
	}
	for _, test := range []struct {
		name, steps string
		want        []string
	}{
		{"file", "COPY a /x", []string{`x 644 0:0 "A"`}},
		{"file to a directory", "COPY a /x/", []string{"x/ 755 0:0", `x/a 644 0:0 "A"`}},
		{"file to one that is there", "COPY a /bin", []string{`bin/a 644 0:0 "A"`}},
		{"file over one", "COPY a /file", []string{`file 644 0:0 "A"`}},
		{"missing directories", "COPY a /x/y/z", []string{"x/ 755 0:0", "x/y/ 755 0:0", `x/y/z 644 0:0 "A"`}},
		{"what is in a directory", "COPY d /x", []string{"x/ 755 0:0", "x/link 777 0:0 2>x", "x/sub/ 755 0:0", `x/sub/y 644 0:0 "Y"`, `x/x 644 0:0 "X"`}},
		{"into a directory", "COPY d /bin", []string{"bin/link 777 0:0 2>x", "bin/sub/ 755 0:0", `bin/sub/y 644 0:0 "Y"`, `bin/x 644 0:0 "X"`}},
		{"empty directory", "COPY empty /x/y", []string{"x/ 755 0:0", "x/y/ 755 0:0"}},
		{"through a link of the image", "COPY lib /lib", []string{`usr/lib/l 644 0:0 "L"`}},
		{"through an absolute one", "COPY a /data/", []string{`srv/data/a 644 0:0 "A"`}},
		{"through a link of the context", "COPY to-d/x /x", []string{`x 644 0:0 "X"`}},
		{"a link that is absolute there", "COPY abs /x", []string{`x 644 0:0 "A"`}},
		{"wildcards", "COPY d/?* [ab]* /x/", []string{"x/ 755 0:0", `x/a 644 0:0 "A"`, `x/abs 644 0:0 "A"`, `x/b.txt 644 0:0 "B"`, `x/link 644 0:0 "X"`, `x/x 644 0:0 "X"`, `x/y 644 0:0 "Y"`}},
		{"wildcards that are names", "COPY c[[]1] /x", []string{`x 644 0:0 "C"`}},
		{"the last of a name wins", "COPY a d/x /x/\nCOPY d/x b.txt /y/", []string{"x/ 755 0:0", `x/a 644 0:0 "A"`, `x/x 644 0:0 "X"`}},
		{"owner by name", "COPY --chown=app:web d/sub /x", []string{"x/ 755 1000:33", `x/y 644 1000:33 "Y"`}},
		{"owner without a group", "COPY --chown=app a /x", []string{`x 644 1000:1001 "A"`}},
		{"owner by number", "COPY --chown=7 a /x", []string{`x 644 7:7 "A"`}},
		{"mode", "COPY --chmod=4750 a /x", []string{`x 4750 0:0 "A"`}},
		{"mode by letters", "COPY --chmod=u=rwX,go=r d /x/", []string{"x/ 755 0:0", "x/link 777 0:0 2>x", "x/sub/ 744 0:0", `x/sub/y 644 0:0 "Y"`, `x/x 644 0:0 "X"`}},
		{"left out", "COPY --exclude=sub --exclude=*.txt d b.txt /x/", []string{"x/ 755 0:0", "x/link 777 0:0 2>x", `x/x 644 0:0 "X"`}},
		{"heredoc", "COPY <<E1 <<E2 /x/\none\nE1\ntwo\nE2", []string{"x/ 755 0:0", `x/E1 644 0:0 "one\n"`, `x/E2 644 0:0 "two\n"`}},
		{"working directory", "USER app\nWORKDIR /w/v\nCOPY a .", []string{"w/ 755 1000:1001", "w/v/ 755 1000:1001"}},
		{"plain file by ADD", "ADD a /x", []string{`x 644 0:0 "A"`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := newBench(t, context)
			result, err := b.build("FROM base\n" + test.steps)
			must(t, err)
			if diff := cmp.Diff(test.want, b.lists(result, 1)[0]); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestCopyErrors(t *testing.T) {
	context := map[string]string{
		"a": "A", "d/bin": "file", "dir/file/": "", "up": "->../../outside", "loop": "->loop", "broken": "->nothing", ".wh.x": "x", ".dockerignore": "hidden*\n", "hidden": "x",
	}
	for _, test := range []struct{ name, steps, want string }{
		{"missing", "RUN true\nCOPY nothing /x", `Dockerfile:3: "nothing" is not in the build's context`},
		{"ignored", "COPY hidden /x", `"hidden" is not in the build's context`},
		{"a link out", "COPY up /x", `"up" is not in the build's context`},
		{"in a circle", "COPY loop /x", "too many symbolic links"},
		{"a link to nothing", "COPY broken /x", `"broken" is not in the build's context`},
		{"below a file", "COPY a/b /x", "no"},
		{"directory over a file", "COPY d /file", `"/file" in the image is no directory`},
		{"below a file of the image", "COPY a /file/x", `"/file/x" in the image: a part of the path is no directory`},
		{"file over a directory", "COPY d /", "directory"},
		{"nested directory over a file", "COPY dir /", `a directory can't be copied over "/file"`},
		{"several to a name", "COPY a d/bin /x", `2 files are copied to "/x"`},
		{"whiteout", "COPY .wh.x /", ".wh."},
		{"unknown user", "COPY --chown=nobody a /x", `the image's /etc/passwd has no "nobody"`},
		{"unknown group", "COPY --chown=app:none a /x", `the image's /etc/group has no "none"`},
		{"unknown user of a directory", "USER nobody\nWORKDIR /x", `Dockerfile:3: the image's /etc/passwd has no "nobody"`},
		{"not in a stage", "COPY --from=base /nothing /x", `"/nothing" is not there`},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := newBench(t, context)
			must(t, os.WriteFile(filepath.Join(filepath.Dir(b.dir), "outside"), []byte("outside"), 0o600))
			result, err := b.build("FROM base\n" + test.steps)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("error %v, want %q", err, test.want)
			}
			if at := (*dockerfile.Error)(nil); !errors.As(err, &at) || at.Line < 2 {
				t.Errorf("error %v has no line", err)
			}
			if len(result.Layers) > 0 {
				t.Errorf("there are layers: %+v", result)
			}
			if test.name == "ignored" && !strings.Contains(smolvm.HintOf(err), ".dockerignore") {
				t.Errorf("hint %q", smolvm.HintOf(err))
			}
		})
	}
}

func TestIgnore(t *testing.T) {
	b := newBench(t, map[string]string{
		"a": "A", "b.log": "B", "d/x": "X", "d/keep": "K", "d/e/f": "F", "g/h/i": "I", "g/h/j.log": "J", "keep.log": "L",
		".dockerignore": "# comment\n**/*.log\n!keep.log\nd\n!d/keep\n/g/h/i\n.dockerignore\n",
	})
	result, err := b.build("FROM scratch\nCOPY . /")
	must(t, err)
	want := []string{`a 644 0:0 "A"`, "d/ 755 0:0", `d/keep 644 0:0 "K"`, "g/ 755 0:0", "g/h/ 755 0:0", `keep.log 644 0:0 "L"`}
	if diff := cmp.Diff(want, b.lists(result, 0)[0]); diff != "" {
		t.Error(diff)
	}
}

func TestUnpack(t *testing.T) {
	archive := archiveOf(t, map[string]string{"top/": "", "top/x": "X", "sub/y": "Y", "../../out": "O", "/abs": "A"})
	packed := func(magic string) string {
		text, err := os.ReadFile(filepath.Join("testdata", "packed."+magic))
		must(t, err)
		return string(text)
	}
	b := newBench(t, map[string]string{"a.tar": string(archive), "plain.tar": "no archive", "b.xz": packed("xz"), "b.bz2": packed("bz2"), "b.gz": packed("gz"), "b.zst": packed("zst"),
		"wh.tar": string(archiveOf(t, map[string]string{"d/.wh.x": ""}))})
	result, err := b.build("FROM base\nADD a.tar plain.tar /x/\nADD a.tar /\nCOPY a.tar /y\nADD --chown=5:6 a.tar /z")
	must(t, err)
	all := b.lists(result, 1)
	want := []string{"x/ 755 0:0", `x/abs 644 0:0 "A"`, `x/out 644 0:0 "O"`, `x/plain.tar 644 0:0 "no archive"`, "x/sub/ 755 0:0", `x/sub/y 644 0:0 "Y"`, "x/top/ 755 0:0", `x/top/x 644 0:0 "X"`}
	if diff := cmp.Diff(want, all[0]); diff != "" {
		t.Error(diff)
	}
	if len(all[2]) != 1 || !strings.HasPrefix(all[2][0], "y 644") {
		t.Errorf("COPY made %q", all[2])
	}
	if !slices.Contains(all[3], `z/top/x 644 5:6 "X"`) {
		t.Errorf("--chown made %q", all[3])
	}
	for _, kind := range []string{"xz", "bz2", "gz", "zst"} {
		result, err := b.build("FROM base\nADD b." + kind + " /p")
		must(t, err)
		if diff := cmp.Diff([]string{"p/ 755 0:0", `p/packed 644 0:0 "packed\n"`}, b.lists(result, 1)[0]); diff != "" {
			t.Errorf("%s: %s", kind, diff)
		}
	}
	if _, err := b.build("FROM base\nADD wh.tar /p"); err == nil || !strings.Contains(err.Error(), ".wh.") {
		t.Errorf("an archive with a whiteout: %v", err)
	}
}

// A directory that was a link of the image's is refused, as docker refuses it.
func TestUnpackOverLink(t *testing.T) {
	b := newBench(t, map[string]string{"a.tar": string(archiveOf(t, map[string]string{"lib/": "", "lib/y": "Y"}))})
	if _, err := b.build("FROM base\nADD a.tar /"); err == nil || !strings.Contains(err.Error(), `"/lib"`) {
		t.Errorf("error %v", err)
	}
}

func TestStages(t *testing.T) {
	b := newBench(t, map[string]string{"a": "A"})
	b.addImage("other", "", map[string]string{"opt/tool": "T", "opt/l": "->tool"})
	result, err := b.build(`FROM base AS build
WORKDIR /src
COPY --chown=1:2 a in
RUN make
FROM scratch AS files
COPY --from=build /src /out
FROM files
COPY --from=build /ran-make /bin/
COPY --from=other /opt /opt
COPY --from=1 /out/in /again
ENTRYPOINT ["/bin/x"]
`)
	must(t, err)
	want := [][]string{
		{"out/ 755 0:0", `out/in 644 1:2 "A"`},
		{"bin/ 755 0:0", `bin/ran-make 644 0:0 "PATH=/bin"`},
		{"opt/ 755 0:0", "opt/l 777 0:0 2>tool", `opt/tool 644 0:0 "T"`},
		{`again 644 1:2 "A"`},
	}
	if diff := cmp.Diff(want, b.lists(result, 0)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"open 3", `run make in /src as ""`}, b.guests.log); diff != "" {
		t.Error(diff)
	}
}

// The configuration is what docker would make, with one history entry a step, and one layer for
// each that is not empty.
func TestResult(t *testing.T) {
	b := newBench(t, map[string]string{"a": "A"})
	at := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	b.opts.Epoch = &at
	text := "FROM base\nENV x=1\nRUN true\nRUN echo\nWORKDIR /bin\nCOPY a /x\nCMD [\"y\"]\n"
	result, err := b.build(text)
	must(t, err)
	var config dockerfile.Config
	must(t, json.Unmarshal(result.Config, &config))
	var got []string
	for _, h := range config.History {
		got = append(got, fmt.Sprintf("%s %v %v %s", h.CreatedBy, h.EmptyLayer, h.Created.Unix() == at.Unix(), h.Comment))
	}
	const comment = " buildkit.dockerfile.v0"
	want := []string{"base false false ", "ENV x=1 true true" + comment, "RUN /bin/sh -c true # buildkit true true" + comment, "RUN /bin/sh -c echo # buildkit false true" + comment,
		"WORKDIR /bin true true" + comment, "COPY a /x # buildkit false true" + comment, `CMD ["y"] true true` + comment}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if len(result.Layers) != 3 || !config.Created.Equal(at) || config.Architecture != "amd64" || config.OS != "linux" {
		t.Errorf("%d layers, created %v for %+v", len(result.Layers), config.Created, config.Platform)
	}
	// Elsewhere, without a cache, it is the same.
	other := newBench(t, map[string]string{"a": "A"})
	other.opts.Epoch = &at
	again, err := other.build(text)
	must(t, err)
	if diff := cmp.Diff(result, again); diff != "" {
		t.Error(diff)
	}
}

func TestCache(t *testing.T) {
	const text = "FROM base\nARG V=1\nCOPY a d /x/\nRUN one\nRUN two\nENV E=1\nRUN three\n"
	context := map[string]string{"a": "A", "d/e": "E", "other": "O"}
	all := []string{"open 2", `run one in / as ""`, `run two in / as ""`, `run three in / as ""`}
	for _, test := range []struct {
		name   string
		change func(b *bench) string
		want   []string
	}{
		{"nothing", func(*bench) string { return text }, nil},
		{"times", func(b *bench) string {
			must(b.t, os.Chtimes(filepath.Join(b.dir, "a"), time.Unix(1, 0), time.Unix(1, 0)), os.Chtimes(filepath.Join(b.dir, "d"), time.Unix(1, 0), time.Unix(1, 0)))
			return text
		}, nil},
		{"what is not copied", func(b *bench) string { b.write(map[string]string{"other": "P", "new": "N"}); return text }, nil},
		{"comments and blanks", func(*bench) string { return "# x\n" + strings.ReplaceAll(text, "RUN one", "\n#y\nrun  one") }, nil},
		{"a label", func(*bench) string { return strings.Replace(text, "RUN two", "LABEL a=b\nRUN two", 1) }, nil},
		{"the same environment otherwise", func(*bench) string { return strings.Replace(text, "ENV E=1", "ENV F=1\nENV E=1", 1) }, []string{"open 4", `run three in / as ""`}},
		{"content", func(b *bench) string { b.write(map[string]string{"a": "B"}); return text }, all},
		{"a mode", func(b *bench) string { must(b.t, os.Chmod(filepath.Join(b.dir, "a"), 0o755)); return text }, all},
		{"a name", func(b *bench) string {
			must(b.t, os.Rename(filepath.Join(b.dir, "d/e"), filepath.Join(b.dir, "d/f")))
			return text
		}, all},
		{"a later command", func(*bench) string { return strings.Replace(text, "RUN two", "RUN 2", 1) }, []string{"open 3", `run 2 in / as ""`, `run three in / as ""`}},
		{"an argument", func(b *bench) string { b.args = map[string]string{"V": "2"}; return text }, []string{"open 2", `run one in / as ""`, `run two in / as ""`, `run three in / as ""`}},
		{"an unknown argument and a proxy", func(b *bench) string { b.args = map[string]string{"X": "2", "http_proxy": "x"}; return text }, nil},
		{"the user", func(*bench) string { return strings.Replace(text, "RUN three", "USER app\nRUN three", 1) }, []string{"open 4", `run three in / as "app"`}},
		{"the base", func(b *bench) string { b.addImage("base", "", map[string]string{"etc/passwd": "x"}); return text }, all},
		{"no cache", func(b *bench) string { b.opts.NoCache = true; return text }, all},
		{"the cache is lost", func(b *bench) string { clear(b.store.cache); return text }, all},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := newBench(t, context)
			first, err := b.build(text)
			must(t, err)
			if diff := cmp.Diff(all, b.guests.log); diff != "" {
				t.Fatal(diff)
			}
			second, err := b.build(test.change(b))
			must(t, err)
			if diff := cmp.Diff(test.want, b.guests.log); diff != "" {
				t.Error(diff)
			}
			if second.Cached != (test.want == nil) {
				t.Errorf("cached: %v", second.Cached)
			}
			if test.name == "nothing" && !bytes.Equal(first.Config, second.Config) {
				t.Errorf("the configuration was %s, and is %s", first.Config, second.Config)
			}
		})
	}
}

// What is copied from a stage is found by its content too: a stage that is made anew in vain does
// no harm.
func TestCacheOfStages(t *testing.T) {
	b := newBench(t, map[string]string{"a": "A", "b": "B"})
	const text = "FROM base AS s\nCOPY a b /\nFROM base\nCOPY --from=s /a /x\nRUN one\n"
	_, err := b.build(text)
	must(t, err)
	b.write(map[string]string{"b": "C"})
	_, err = b.build(text)
	must(t, err)
	if len(b.guests.log) > 0 {
		t.Errorf("ran %q", b.guests.log)
	}
	// And now nothing needs to be read.
	for digest := range b.store.layers {
		delete(b.store.layers, digest)
	}
	_, err = b.build(text)
	must(t, err)
}

// A copy between two commands, and a command that is found behind one that is not, get into the
// workspace.
func TestPut(t *testing.T) {
	b := newBench(t, map[string]string{"a": "A"})
	_, err := b.build("FROM base\nRUN one\nCOPY a /x\nWORKDIR /w\nRUN two\n")
	must(t, err)
	want := []string{"open 1", `run one in / as ""`, `put / ["x 644 0:0 \"A\""]`, `put / ["w/ 755 0:0"]`, `run two in /w as ""`}
	if diff := cmp.Diff(want, b.guests.log); diff != "" {
		t.Error(diff)
	}
}

func TestMounts(t *testing.T) {
	b := newBench(t, map[string]string{"a": "A", "d/e": "E"})
	const text = `FROM base
RUN --mount=type=bind,target=/ctx --mount=source=d,target=/d --mount=type=cache,target=/c,uid=5 --mount=type=cache,target=/c2,id=/c --mount=type=tmpfs,target=/t,size=10m --mount=type=secret,id=s,mode=0440 --mount=type=secret,id=e,env=E --mount=type=secret,id=none one
RUN --mount=type=cache,target=/c --mount=from=base,src=/file,dst=/f two
RUN <<X
#!/bin/x
y
X
`
	result, err := b.build(text)
	must(t, err)
	want := []string{
		"open 1",
		`run one in / as "" /ctx<mount [mount/ 755 0:0] [mount/a 644 0:0 "A"] [mount/d/ 755 0:0] [mount/d/e 644 0:0 "E"] /d<mount [mount/ 755 0:0] [mount/e 644 0:0 "E"] ` +
			`/c<mount [mount/ 755 5:0] /c2<mount [mount/ 755 5:0] /t< /run/secrets/s<mount [mount 440 0:0 "secret of s"]`,
		`run two in / as "" /c<mount [mount/ 755 0:0] [mount/kept 644 0:0 "cache"] /f<mount [mount 644 0:0 "file"]`,
		`run /dev/pipes/X in / as "" /dev/pipes<mount [mount/ 755 0:0] [mount/X 755 0:0 "#!/bin/x\ny\n"]`,
	}
	if diff := cmp.Diff(want, b.guests.log); diff != "" {
		t.Error(diff)
	}
	if lists := b.lists(result, 1); !strings.Contains(lists[0][0], "E=secret of e") || strings.Contains(lists[1][0], "secret") {
		t.Errorf("environment in %q", lists)
	}
	secrets := b.opts.Secrets
	// What is in caches and secrets is nothing that steps depend on; what is mounted is.
	b.opts.Secrets = func(string) ([]byte, bool, error) { return []byte("another"), true, nil }
	_, err = b.build(text)
	must(t, err)
	if len(b.guests.log) > 0 {
		t.Errorf("ran again: %q", b.guests.log)
	}
	b.opts.Secrets = secrets
	b.write(map[string]string{"d/e": "F"})
	_, err = b.build(text)
	must(t, err)
	if len(b.guests.log) != 2 { // what it has made is the same, so the next ones are found
		t.Errorf("ran %q", b.guests.log)
	}
	b.opts.Secrets = func(string) ([]byte, bool, error) { return nil, false, nil }
	if _, err := b.build("FROM base\nRUN --mount=type=secret,id=s,required=true x"); err == nil || !strings.Contains(smolvm.HintOf(err), "--secret id=s") {
		t.Errorf("a secret that is missing: %v", err)
	}
}

func TestRunFails(t *testing.T) {
	b := newBench(t, nil)
	b.guests.fail = "bad"
	var events []smolvm.BuildEvent
	b.opts.Progress = func(e smolvm.BuildEvent) { events = append(events, e) }
	_, err := b.build("FROM base\nRUN good\nRUN --mount=type=cache,target=/c bad\nRUN never\n")
	if err == nil || !strings.Contains(err.Error(), `Dockerfile:3: the command "/bin/sh -c bad" has failed: exit status 3`) {
		t.Errorf("error %v", err)
	}
	var got []string
	for _, e := range events {
		line := fmt.Sprintf("%d %s", e.Step, e.Name)
		switch {
		case e.Output != nil:
			line += fmt.Sprintf(" %q", e.Output)
		case e.Done:
			line += fmt.Sprintf(" done %v %v", e.Cached, e.Err != nil)
		}
		got = append(got, line)
	}
	want := []string{"1 [1/4] FROM base", "1 [1/4] FROM base done true false", "2 [2/4] RUN good", `2 [2/4] RUN good "ran good\n"`, "2 [2/4] RUN good done false false",
		"3 [3/4] RUN --mount=type=cache,target=/c bad", `3 [3/4] RUN --mount=type=cache,target=/c bad "ran bad\n"`, "3 [3/4] RUN --mount=type=cache,target=/c bad done false true"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// What has been made is found again.
	b.guests.fail = ""
	_, err = b.build("FROM base\nRUN good\nRUN --mount=type=cache,target=/c bad\n")
	must(t, err)
	if diff := cmp.Diff([]string{"open 2", `run bad in / as "" /c<mount [mount/ 755 0:0] [mount/kept 644 0:0 "cache"]`}, b.guests.log); diff != "" {
		t.Error(diff)
	}
}

// A build that is called off leaves nothing.
func TestInterrupted(t *testing.T) {
	b := newBench(t, map[string]string{"a": "A"})
	ctx, cancel := context.WithCancelCause(t.Context())
	interrupted := errors.New("interrupted")
	plan, err := dockerfile.New(ctx, []byte("FROM scratch\nCOPY a /\nCOPY a /b\n"), dockerfile.Options{Name: "Dockerfile", Arch: "amd64"})
	must(t, err)
	dir, err := files.OpenDir(b.dir)
	must(t, err)
	defer func() { _ = dir.Close() }()
	b.opts.Context = dir
	b.opts.Progress = func(e smolvm.BuildEvent) {
		if e.Done {
			cancel(interrupted)
		}
	}
	if _, err := Build(ctx, plan, b.opts); !errors.Is(err, interrupted) {
		t.Errorf("error %v", err)
	}
}
