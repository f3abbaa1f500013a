package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// readBack writes an answer as a guest does, and reads it as the host does.
func readBack(t *testing.T, sent any) (Answer, error) {
	t.Helper()
	body, err := json.Marshal(sent)
	if err != nil {
		t.Fatal(err)
	}
	return ReadAnswer(strings.NewReader(fmt.Sprintf("%s%d\n%s", Magic, len(body), body)))
}

// An honest answer comes as it was sent.
func TestAnswerComesWhole(t *testing.T) {
	sent := Answer{
		Version: "1.2", Kernel: "6.1.0-18-cloud-amd64", Warnings: []string{"clock: is late"}, Error: "no root",
		Identity: Identity{Hostname: "web", MachineID: strings.Repeat("a", 32), HostKey: "SHA256:abc+/", Random: strings.Repeat("ab", 16)},
		Timeline: []Step{{"ready", time.Second}},
	}
	if got, err := readBack(t, sent); err != nil || fmt.Sprint(got) != fmt.Sprint(sent) {
		t.Errorf("got %+v, %v", got, err)
	}
}

// What a guest answers goes to the database and to terminals, so it is bounded (C7).
func TestAnswerIsBounded(t *testing.T) {
	long := strings.Repeat("\x1b]0;x\a", 50)
	answer, err := readBack(t, Answer{
		Version: long, Kernel: long, Error: long,
		Warnings: slices.Repeat([]string{long}, maxWarnings+1),
		Timeline: slices.Repeat([]Step{{long[:100], -1}}, maxSteps+1),
	})
	if err != nil {
		t.Fatal(err)
	}
	checkBounds(t, answer)
	if len(answer.Warnings) != maxWarnings || len(answer.Timeline) != maxSteps || utf8.RuneCountInString(answer.Warnings[0]) != maxText {
		t.Errorf("too much was cut off: %d warnings, %d steps", len(answer.Warnings), len(answer.Timeline))
	}
	for name, identity := range map[string]Identity{
		"long name":     {Hostname: strings.Repeat("x", maxIdentity+1)},
		"escape":        {BootID: "\x1b[2J"},
		"no hex":        {Random: "xyz"},
		"much random":   {Random: strings.Repeat("ab", maxRandom+1)},
		"line breaks":   {MachineID: "a\nb"},
		"long, no text": {MAC: strings.Repeat("\a", 1000)},
	} {
		if _, err := readBack(t, Answer{Identity: identity}); !errors.Is(err, ErrProtocol) || len(err.Error()) > 500 {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, text := range map[string]string{
		"large message":  fmt.Sprintf("%s%d\n", Magic, maxGuestMessage+1),
		"endless noise":  strings.Repeat("SMOLV", (maxSkipped+100)/5),
		"long number":    fmt.Sprintf("%s%d\n{\"version\":1%050000d}", Magic, 50013, 0),
		"no such number": Magic + "4\n\x1b[2J",
	} {
		if _, err := ReadAnswer(strings.NewReader(text)); err == nil || len(err.Error()) > 500 || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%s: %v", name, err)
		}
	}
	control, err := ReadControlAnswer(strings.NewReader(Magic + `18` + "\n" + `{"error":"a\nb\u0007"}`[:18]))
	if err == nil {
		t.Errorf("a message that is cut is taken: %+v", control)
	}
	control, err = ReadControlAnswer(strings.NewReader(Magic + "22\n" + `{"error":"a\nb\u0007"}`))
	if err != nil || control.Error != "a b\uFFFD" {
		t.Errorf("got %q, %v", control.Error, err)
	}
}

func checkBounds(t *testing.T, a Answer) {
	t.Helper()
	texts := append([]string{a.Version, a.Kernel, a.Error, a.Identity.Hostname, a.Identity.MachineID, a.Identity.BootID, a.Identity.HostKey, a.Identity.MAC, a.Identity.Random}, a.Warnings...)
	for _, step := range a.Timeline {
		texts = append(texts, step.Name)
		if step.At < 0 {
			t.Errorf("step at %s", step.At)
		}
	}
	total := 0
	for _, text := range texts {
		total += len(text)
		if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q is not text", text)
		}
	}
	if total > 64<<10 || len(a.Warnings) > maxWarnings || len(a.Timeline) > maxSteps {
		t.Errorf("an answer has %d bytes, %d warnings, %d steps", total, len(a.Warnings), len(a.Timeline))
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"version":"1","warnings":["a"],"identity":{"random":"00"},"timeline":[{"name":"x","at_ns":-1}]}`))
	f.Add([]byte("{\"error\":\"\x1b\xff\"}"))
	f.Fuzz(func(t *testing.T, body []byte) {
		answer, err := ReadAnswer(bytes.NewReader(fmt.Appendf(nil, "%s%d\n%s", Magic, len(body), body)))
		if err == nil {
			checkBounds(t, answer)
		} else if len(err.Error()) > 2000 {
			t.Errorf("error has %d bytes", len(err.Error()))
		}
	})
}
