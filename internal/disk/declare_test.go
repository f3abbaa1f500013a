package disk

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
)

// qcow2 returns a disk of this format with something changed in its header.
func qcow2(change func(header []byte)) []byte {
	image := emptyOverlay("", "", 1<<20)
	binary.BigEndian.PutUint64(image[8:], 0) // based on nothing
	if change != nil {
		change(image)
	}
	return image
}

// Only what is declared decides what a disk is, and what leads a VMM to other files is
// refused (S1).
func TestDeclare(t *testing.T) {
	be := binary.BigEndian
	feature := func(bit int) []byte {
		return qcow2(func(h []byte) { be.PutUint64(h[72:], 1<<bit) })
	}
	for name, test := range map[string]struct {
		content []byte
		format  string
		want    string // format, or error
	}{
		"nothing declared":        {marked(0x438, "\x53\xef"), "", Raw},
		"raw":                     {marked(0x438, "\x53\xef"), Raw, Raw},
		"ext4 that begins so":     {append([]byte(qcow2Magic), marked(0x438, "\x53\xef")[4:]...), "", ErrUndeclared.Error()},
		"qcow2, nothing declared": {qcow2(nil), "", ErrUndeclared.Error()},
		"qcow2 as raw":            {qcow2(nil), Raw, Raw},
		"qcow2":                   {qcow2(nil), QCOW2, QCOW2},
		"raw as qcow2":            {marked(0x438, "\x53\xef"), QCOW2, "is no qcow2 disk"},
		"nothing as qcow2":        {nil, QCOW2, "is no qcow2 disk"},
		"another format":          {nil, "vmdk", `format "vmdk" is not known`},
		"a base":                  {emptyOverlay("/etc/shadow", Raw, 1<<20), QCOW2, `is based on another file ("/etc/shadow")`},
		"a base without a name":   {qcow2(func(h []byte) { be.PutUint64(h[8:], 200) }), QCOW2, "is based on another file"},
		"a data file":             {feature(2), QCOW2, "keeps its data in another file"},
		"was not closed":          {feature(0), QCOW2, QCOW2},
		"corrupt":                 {feature(1), QCOW2, "is marked as corrupt"},
		"other compression":       {feature(3), QCOW2, QCOW2},
		"subclusters":             {feature(4), QCOW2, QCOW2},
		"a feature to come":       {feature(5), QCOW2, "features that are not known (0x20)"},
		"encrypted":               {qcow2(func(h []byte) { be.PutUint32(h[32:], 2) }), QCOW2, "is encrypted"},
		"snapshots":               {qcow2(func(h []byte) { be.PutUint32(h[60:], 1) }), QCOW2, "has snapshots in it"},
	} {
		t.Run(name, func(t *testing.T) {
			info, err := Declare(write(t, "d", test.content), test.format)
			switch {
			case err == nil || errors.Is(err, ErrNoFileSystem):
				if info.Format != test.want {
					t.Errorf("it is taken for %q (%v), want %q", info.Format, err, test.want)
				}
			case !strings.Contains(err.Error(), test.want):
				t.Errorf("error is %v, want %q", err, test.want)
			}
		})
	}
}
