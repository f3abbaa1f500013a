package vmm

import (
	"os"
	"strings"
	"testing"
)

func TestNICValidate(t *testing.T) {
	t.Parallel()
	const mac = "02:00:00:00:00:02"
	for name, test := range map[string]struct {
		nic  NIC
		want string // in the error; empty: there is none
	}{
		"link":           {NIC{MAC: mac, Link: os.Stdin}, ""},
		"TAP":            {NIC{MAC: mac, TAP: "smol-tap0.1_A"}, ""},
		"both":           {NIC{MAC: mac, Link: os.Stdin, TAP: "tap0"}, `a link and the TAP interface "tap0"`},
		"neither":        {NIC{MAC: mac}, "neither a link nor a TAP"},
		"pattern":        {NIC{MAC: mac, TAP: "tap%d"}, `"tap%d" is no name`},
		"option":         {NIC{MAC: mac, TAP: "tap0,x=y"}, "is no name"},
		"path":           {NIC{MAC: mac, TAP: "../tap0"}, "is no name"},
		"parent":         {NIC{MAC: mac, TAP: ".."}, "is no name"},
		"too long":       {NIC{MAC: mac, TAP: strings.Repeat("t", 16)}, "at most 15"},
		"as long as can": {NIC{MAC: mac, TAP: strings.Repeat("t", 15)}, ""},
		"no MAC":         {NIC{TAP: "tap0"}, "MAC"},
		"negative MTU":   {NIC{MAC: mac, TAP: "tap0", MTU: -1}, "MTU"},
	} {
		err := test.nic.Validate()
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}
