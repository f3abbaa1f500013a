package ociconfig

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/smolvm/smolvm"
)

// What a VM's configuration leaves to its image is the image's, and what it says is not.
func TestApply(t *testing.T) {
	image := smolvm.ImageConfig{
		Entrypoint: []string{"/run"}, Cmd: []string{"it"}, Env: []string{"A=1", "B=2", "1bad=x", "dotted.name=y"},
		WorkingDir: "srv", User: "app:staff", StopSignal: "SIGQUIT", ExposedPorts: []string{"53/udp", "80/tcp", "132/sctp"},
		Labels: map[string]string{"org.example/a": "1", "team": "red", "not a name": "x", "long": strings.Repeat("x", 1000)},
	}
	got, err := Apply(smolvm.VMConfig{ID: "vm", Env: map[string]string{"B": "3"}, Labels: map[string]string{"team": "blue"}}, image)
	if err != nil {
		t.Fatal(err)
	}
	want := smolvm.VMConfig{ID: "vm",
		Entrypoint: []string{"/run"}, Cmd: []string{"it"}, WorkingDir: "/srv", User: "app:staff", StopSignal: "SIGQUIT",
		Env:    map[string]string{"PATH": DefaultPath, "A": "1", "B": "3", "dotted.name": "y"},
		Labels: map[string]string{"org.example/a": "1", "team": "blue"},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("what is left to the image:\n%s", diff)
	}
	if err := got.WithDefaults().Validate(); err != nil {
		t.Errorf("it is not valid: %v", err)
	}
	if again, err := Apply(got, image); err != nil || !reflect.DeepEqual(again, got) {
		t.Errorf("applied again it is %+v, %v", again, err)
	}

	own := smolvm.VMConfig{Entrypoint: []string{"sh"}, User: "root", WorkingDir: "/", StopSignal: "INT"}
	got, err = Apply(own, image)
	if err != nil || !slices.Equal(got.CommandLine(), []string{"sh"}) || got.User != "root" || got.WorkingDir != "/" || got.StopSignal != "INT" {
		t.Errorf("what overrides it gives %+v, %v", got, err)
	}
	got, err = Apply(smolvm.VMConfig{}, smolvm.ImageConfig{StopSignal: "SIGNONE"})
	if err != nil || got.StopSignal != "" || got.WorkingDir != "/" {
		t.Errorf("of an image that says nothing it is %+v, %v", got, err)
	}
	if _, err := Apply(smolvm.VMConfig{}, smolvm.ImageConfig{User: "a:b:c"}); err == nil {
		t.Error("a user of three parts is one")
	}
}

func TestPublishAll(t *testing.T) {
	image := smolvm.ImageConfig{ExposedPorts: []string{"53/udp", "80/tcp", "132/sctp"}}
	own := smolvm.PortForward{HostPort: 8080, GuestPort: 80}
	got, err := Apply(smolvm.VMConfig{PublishAll: true, PortForwards: []smolvm.PortForward{own}}, image)
	loopback := netip.MustParseAddr("127.0.0.1")
	want := []smolvm.PortForward{own, {HostAddr: loopback, GuestPort: 53, Protocol: smolvm.UDP}}
	if err != nil || !slices.Equal(got.PortForwards, want) {
		t.Errorf("forwards are %v, %v", got.PortForwards, err)
	}
	many := smolvm.ImageConfig{}
	for range maxPublished + 1 {
		many.ExposedPorts = append(many.ExposedPorts, "80/tcp")
	}
	if _, err := Apply(smolvm.VMConfig{PublishAll: true}, many); err == nil {
		t.Error("any number of ports is forwarded")
	}
}

func TestApplyInit(t *testing.T) {
	for _, test := range []struct {
		config     smolvm.VMConfig
		init, args string
	}{
		{smolvm.VMConfig{Cmd: []string{"sh"}}, "", ""},
		{smolvm.VMConfig{Init: "auto"}, "/sbin/init", "quiet init=/sbin/init"},
		{smolvm.VMConfig{Init: "auto", Cmd: []string{"sh"}}, "/sbin/init", "quiet init=/sbin/init"},
		{smolvm.VMConfig{Init: "auto", Entrypoint: []string{"/lib/systemd/systemd"}}, "/lib/systemd/systemd", "quiet init=/lib/systemd/systemd"},
		{smolvm.VMConfig{Init: "auto", Entrypoint: []string{"/a b=c"}}, "/sbin/init", "quiet init=/sbin/init"},
		{smolvm.VMConfig{Init: "/my/init", BootArgs: "own"}, "/my/init", "own init=/my/init"},
	} {
		got := ApplyInit(test.config, "quiet")
		if got.Init != test.init || got.BootArgs != test.args || test.init != "" && len(got.CommandLine()) > 0 {
			t.Errorf("%+v: init %q, arguments %q, command %q", test.config, got.Init, got.BootArgs, got.CommandLine())
		}
	}
}

func TestParseSignal(t *testing.T) {
	for text, want := range map[string]int{
		"": 0, "SIGTERM": 15, "term": 15, "9": 9, "SIGRTMIN+3": 37, "RTMIN": 34, "64": 64,
		"65": -1, "0": -1, "-1": -1, "SIGNONE": -1, "SIGRTMIN+40": -1, "SIG": -1,
	} {
		got, err := ParseSignal(text)
		if want < 0 && err == nil || want >= 0 && (err != nil || got != want) {
			t.Errorf("%q is %d, %v; want %d", text, got, err, want)
		}
	}
}
