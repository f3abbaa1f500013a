package secret

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return "file:" + path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SMOLVM_TEST_SET", "value of it")
	t.Setenv("SMOLVM_TEST_EMPTY", "")
	long := strings.Repeat("v", smolvm.MaxSecretValue)
	for source, want := range map[string]string{
		"env:SMOLVM_TEST_SET":       "value of it",
		file("plain", "value"):      "value",
		file("line", "value\n"):     "value",
		file("dos", "value\r\n"):    "value",
		file("long", long+"\r\n"):   long,
		file("longer", long+"v\n"):  "!longer",
		"env:SMOLVM_TEST_EMPTY":     "!empty",
		"env:SMOLVM_TEST_NOT_SET":   "!not set",
		file("two", "value\nmore"):  "!line breaks",
		file("nul", "val\x00ue"):    "!control",
		file("blank", " value\n"):   "!blank",
		"file:" + dir:               "!no regular file",
		"file:" + fifo:              "!no regular file",
		"file:" + dir + "/nowhere":  "!no such file",
		"value":                     "!neither",
		file("injected", "a\rX: b"): "!line breaks",
	} {
		got, err := Resolve([]smolvm.Secret{{Name: "T", Source: source, Hosts: []string{"a.example", "b.example:8443"}}})
		why, bad := strings.CutPrefix(want, "!")
		switch {
		case bad && (err == nil || !strings.Contains(err.Error(), why) || strings.Contains(err.Error(), "value\n")):
			t.Errorf("%s: %v, want %q", source, err, why)
		case bad:
		case err != nil:
			t.Errorf("%s: %v", source, err)
		case got[0].Value.Reveal() != want || !reflect.DeepEqual(got[0].Hosts, []Host{{"a.example", 443}, {"b.example", 8443}}):
			t.Errorf("%s: %q for %v", source, got[0].Value.Reveal(), got[0].Hosts)
		}
	}
	_, err := Resolve([]smolvm.Secret{{Name: "T", Source: "env:SMOLVM_TEST_NOT_SET", Hosts: []string{"a.example"}}})
	if smolvm.HintOf(err) == "" {
		t.Errorf("nobody is told what to do: %v", err)
	}
	if got := Variables([]smolvm.Secret{{Source: "env:A"}, {Source: "file:/b"}}); !reflect.DeepEqual(got, []string{"A"}) {
		t.Errorf("variables %q", got)
	}
}

// A value is in orders, and in nothing that people or logs get to see.
func TestValueIsHidden(t *testing.T) {
	t.Parallel()
	one := Secret{Name: "T", Value: "the value"}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "value", one.Value, "secret", one)
	for _, text := range []string{
		fmt.Sprint(one), fmt.Sprintf("%v %+v %#v %s %q %x", one, one, one, one.Value, one.Value, one.Value), log.String(),
	} {
		if strings.Contains(text, "the value") || strings.Contains(text, fmt.Sprintf("%x", "the value")) {
			t.Errorf("it is shown: %s", text)
		}
	}
	text, err := json.Marshal(one)
	var back Secret
	if err == nil {
		err = json.Unmarshal(text, &back)
	}
	if err != nil || back.Value.Reveal() != "the value" {
		t.Errorf("by orders: %s, %v", text, err)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	secrets := []smolvm.Secret{{Name: "T", Source: "env:T", Hosts: []string{"a.example", "b.example:8443"}}}
	for _, test := range []struct {
		rules     []string
		otherwise smolvm.EgressDefault
		want      string
	}{
		{[]string{"allow a.example", "allow b.example:8443/tcp"}, smolvm.EgressDeny, ""},
		{[]string{"allow *.example"}, smolvm.EgressDeny, ""},
		{[]string{"allow a.example:443", "allow b.example:443"}, smolvm.EgressDeny, "b.example:8443"},
		{[]string{"allow a.example/udp", "allow b.example"}, smolvm.EgressDeny, "a.example:443"},
		{[]string{"deny a.example", "allow *.example"}, smolvm.EgressDeny, "a.example:443"},
		{[]string{"allow 192.0.2.0/24", "allow b.example"}, smolvm.EgressDeny, "not resolved"},
		{nil, smolvm.EgressDeny, "a.example:443"},
		{[]string{"allow *.example"}, smolvm.EgressAllow, "egress.default"},
		{[]string{"allow *.example"}, smolvm.EgressDNSOnly, "egress.default"},
	} {
		policy, err := network.PolicyOf(smolvm.EgressPolicy{Default: test.otherwise, Rules: test.rules})
		if err != nil {
			t.Fatal(err)
		}
		err = Check(secrets, policy)
		var invalid *smolvm.ValidationError
		switch {
		case test.want == "" && err != nil:
			t.Errorf("%s %q: %v", test.otherwise, test.rules, err)
		case test.want != "" && (!errors.As(err, &invalid) || !strings.Contains(err.Error(), test.want)):
			t.Errorf("%s %q: %v, want %q", test.otherwise, test.rules, err, test.want)
		}
	}
	if err := Check(nil, network.Policy{}); err != nil {
		t.Errorf("without secrets: %v", err)
	}
}
