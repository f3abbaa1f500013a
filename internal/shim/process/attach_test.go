package process

import (
	"encoding/json"
	"errors"
	"log/slog"
	"reflect"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/testenv"
)

func newTestProcess() *process { return &process{log: slog.New(slog.DiscardHandler)} }

func TestAttachUnknownMode(t *testing.T) {
	for _, mode := range []smolvm.NetworkMode{"carrier-pigeon", "TAP", "USER"} {
		attached, err := newTestProcess().attach(network.Config{Mode: mode}, func(string) {})
		if !errors.Is(err, smolvm.ErrUnsupported) || smolvm.HintOf(err) == "" || attached != nil {
			t.Errorf("%q: %v, %v", mode, attached, err)
		}
	}
}

// A VM with an egress policy is not connected in a mode that would let everything out.
func TestAttachWithPolicyNobodyEnforces(t *testing.T) {
	config := network.Config{Mode: network.Bridge, Egress: &network.Egress{Policy: network.Policy{Default: network.DefaultDeny}}}
	attached, err := newTestProcess().attach(config, func(string) {})
	if !errors.Is(err, smolvm.ErrUnsupported) || smolvm.HintOf(err) == "" || attached != nil {
		t.Errorf("%v, %v", attached, err)
	}
}

// A VM that stands by in one mode is not claimed for another, and can be claimed again.
func TestClaimInAnotherMode(t *testing.T) {
	for _, test := range []struct {
		is, asked *network.Config
		refused   bool
	}{
		{&network.Config{}, &network.Config{Mode: network.TAP}, true},
		{&network.Config{}, nil, true},
		{nil, &network.Config{}, true},
		{&network.Config{}, &network.Config{Mode: smolvm.NetworkUser}, false},
		{nil, nil, false},
	} {
		s := newTestProcess()
		s.spec = shim.Spec{ID: "stood-by", Network: test.is}
		before := s.spec
		claimer, ours := testenv.UnixPair(t)
		text, err := json.Marshal(shim.ClaimOrder{Spec: shim.Spec{ID: "claims", Network: test.asked}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := claimer.Write(append(text, '\n')); err != nil {
			t.Fatal(err)
		}
		_, err = s.takeClaim(ours) // it fails in any case, as no files come
		if err == nil || errors.Is(err, smolvm.ErrUnsupported) != test.refused {
			t.Errorf("a VM in mode %q is claimed for mode %q: %v", test.is.UsedMode(), test.asked.UsedMode(), err)
		}
		if !reflect.DeepEqual(s.spec, before) {
			t.Errorf("a claim that was refused leaves %+v", s.spec)
		}
	}
	s := newTestProcess()
	s.spec.Network = &network.Config{}
	claimer, ours := testenv.UnixPair(t)
	if _, err := claimer.Write([]byte(`{"dismiss":true}` + "\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.takeClaim(ours); !errors.Is(err, errDismissed) {
		t.Errorf("a dismissal names no mode: %v, want %v", err, errDismissed)
	}
}
