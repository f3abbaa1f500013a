package cli

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm"
)

func TestParseMebibytes(t *testing.T) {
	t.Parallel()
	good := map[string]int64{"512": 512, "512M": 512, "512mib": 512, "2G": 2048, "2gb": 2048, "1T": 1 << 20, "0": 0}
	for text, want := range good {
		if got, err := parseMebibytes(text); err != nil || got != want {
			t.Errorf("parseMebibytes(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "M", "-1", "1.5G", "1K", "2GG", "G2", "99999999999999999999", "9999999999999T"} {
		if got, err := parseMebibytes(text); err == nil {
			t.Errorf("parseMebibytes(%q) = %d, want an error", text, got)
		}
	}
}

func TestParseForwards(t *testing.T) {
	t.Parallel()
	local := netip.MustParseAddr("127.0.0.1")
	good := map[string][]smolvm.PortForward{
		"80":                {{GuestPort: 80}},
		":80":               {{GuestPort: 80}},
		"8080:80":           {{HostPort: 8080, GuestPort: 80}},
		"0:80":              {{GuestPort: 80}},
		"8080:80/tcp":       {{HostPort: 8080, GuestPort: 80}},
		"0.0.0.0:8080:80":   {{HostAddr: netip.MustParseAddr("0.0.0.0"), HostPort: 8080, GuestPort: 80}},
		"127.0.0.1::80":     {{HostAddr: local, GuestPort: 80}},
		"[::1]:8080:80":     {{HostAddr: netip.IPv6Loopback(), HostPort: 8080, GuestPort: 80}},
		"[fe80::1]:8080:80": {{HostAddr: netip.MustParseAddr("fe80::1"), HostPort: 8080, GuestPort: 80}},
		"localhost:8080:80": {{HostAddr: local, HostPort: 8080, GuestPort: 80}},
		"localhost::80":     {{HostAddr: local, GuestPort: 80}},
		"53/udp":            {{GuestPort: 53, Protocol: smolvm.UDP}},
		"5353:53/UDP":       {{HostPort: 5353, GuestPort: 53, Protocol: smolvm.UDP}},
		"8000-8001:80-81":   {{HostPort: 8000, GuestPort: 80}, {HostPort: 8001, GuestPort: 81}},
		"80-81":             {{GuestPort: 80}, {GuestPort: 81}},
		"80-80":             {{GuestPort: 80}},
		"localhost:7-8:8-9/udp": {
			{HostAddr: local, HostPort: 7, GuestPort: 8, Protocol: smolvm.UDP},
			{HostAddr: local, HostPort: 8, GuestPort: 9, Protocol: smolvm.UDP},
		},
	}
	for text, want := range good {
		for i := range want {
			if want[i].Protocol == "" {
				want[i].Protocol = smolvm.TCP
			}
		}
		if got, err := parseForwards(text); err != nil || !slices.Equal(got, want) {
			t.Errorf("parseForwards(%q) = %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", ":", "80:", "0", "8080:0", "65536", "a:80", "host:8080:80", "80/sctp", "80/", "80/udp/udp", "1:2:3:4", "-1:80",
		"80-", "-80", "81-80", "0-1", "0-1:80-81", "8000-8002:80-81", "8000:80-81", "8000-8001:80", "1-2-3", "1-60000", "65535-65536",
	} {
		if got, err := parseForwards(text); err == nil {
			t.Errorf("parseForwards(%q) = %+v, want an error", text, got)
		}
	}
}

// What is accepted as a port forward is a valid one.
func FuzzParseForwards(f *testing.F) {
	for _, seed := range []string{"80", "8080:80", "[::1]:8080:80", "0.0.0.0::80/tcp", "localhost:1-9:2-10/udp"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		forwards, err := parseForwards(text)
		if err != nil {
			return
		}
		for _, forward := range forwards {
			if err := forward.Validate(); err != nil {
				t.Errorf("parseForwards(%q) = %+v: %v", text, forward, err)
			}
		}
	})
}

func TestParseDrive(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]smolvm.Drive{
		"data.img":    {Path: "data.img"},
		"data.img:ro": {Path: "data.img", ReadOnly: true},
		"data.img:rw": {Path: "data.img"},
		"a:b":         {Path: "a:b"},

		"data.img:qcow2":    {Path: "data.img", Format: smolvm.FormatQCOW2},
		"data.img:ro:raw":   {Path: "data.img", ReadOnly: true, Format: smolvm.FormatRaw},
		"data.img:qcow2:ro": {Path: "data.img", ReadOnly: true, Format: smolvm.FormatQCOW2},
		"raw:raw:raw":       {Path: "raw:raw", Format: smolvm.FormatRaw},
		"a:qcow2:ro,backing=b:qcow2,backing=c:d:raw": {Path: "a", ReadOnly: true, Format: smolvm.FormatQCOW2, Backing: []smolvm.DiskFile{
			{Path: "b", Format: smolvm.FormatQCOW2}, {Path: "c:d", Format: smolvm.FormatRaw},
		}},
	} {
		if got, err := parseDrive(text); err != nil || !cmp.Equal(got, want) {
			t.Errorf("parseDrive(%q) = %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", ":ro", ":qcow2", ":ro:raw", ",backing=b:raw", "a:qcow2,backing=b", "a:qcow2,backing=:raw", "a:qcow2,backing=b:ro"} {
		if got, err := parseDrive(text); err == nil {
			t.Errorf("parseDrive(%q) returns %+v", text, got)
		}
	}
}

func TestParseCopyArg(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][2]string{
		"web:/etc":   {"web", "/etc"},
		"web:":       {"web", ""},
		"web:a:b":    {"web", "a:b"},
		"file":       {"", "file"},
		"./a:b":      {"", "./a:b"},
		"/a:b":       {"", "/a:b"},
		"../web:etc": {"", "../web:etc"},
		":x":         {"", ":x"},
	} {
		path := parseCopyArg(text)
		if diff := cmp.Diff(want, [2]string{path.VM, path.Path}); diff != "" {
			t.Errorf("parseCopyArg(%q) (-want +got):\n%s", text, diff)
		}
	}
}

func TestSplitImage(t *testing.T) {
	t.Parallel()
	tests := []struct {
		args    []string
		dash    int
		image   string
		command []string
	}{
		{nil, -1, "", nil},
		{nil, 0, "", nil},
		{[]string{"uname", "-a"}, 0, "", []string{"uname", "-a"}},
		{[]string{"base"}, -1, "base", nil},
		{[]string{"base", "uname", "-a"}, -1, "base", []string{"uname", "-a"}},
		{[]string{"base", "--", "uname", "--", "-a"}, -1, "base", []string{"uname", "--", "-a"}},
		{[]string{"base", "--"}, -1, "base", nil},
	}
	for _, test := range tests {
		image, command, err := splitImage(test.args, test.dash)
		if err != nil || image != test.image || !cmp.Equal(command, test.command, cmpopts.EquateEmpty()) {
			t.Errorf("splitImage(%q, %d) = %q, %q, %v; want %q, %q", test.args, test.dash, image, command, err, test.image, test.command)
		}
	}
}

func TestNearest(t *testing.T) {
	t.Parallel()
	known := []string{"web", "database", "vm-1a2b3c4d"}
	for word, want := range map[string]string{
		"wbe": "web", "webb": "web", "databse": "database", "vm-1a2b3c4e": "vm-1a2b3c4d",
		"mail": "", "w": "", "": "", "x": "",
	} {
		if got := nearest(word, known); got != want {
			t.Errorf("nearest(%q) = %q, want %q", word, got, want)
		}
	}
}

func TestTable(t *testing.T) {
	t.Parallel()
	vms := &table{titles: []string{"ID", "STATE", "IMAGE"}, shrinks: []int{2, 0}}
	vms.addCells(cell{text: "web"}, stateCell(smolvm.StateRunning), cell{text: "a-long-name-of-an-image"})
	vms.add("a-very-long-name", "stopped", "")
	tests := []struct {
		name  string
		width int
		color bool
		want  string
	}{
		{"whole", 0, false, "" +
			"ID                STATE    IMAGE\n" +
			"web               running  a-long-name-of-an-image\n" +
			"a-very-long-name  stopped  -\n"},
		{"narrow", 40, false, "" +
			"ID                STATE    IMAGE\n" +
			"web               running  a-long-name-…\n" +
			"a-very-long-name  stopped  -\n"},
		{"too narrow", 10, false, "" +
			"ID      STATE    IMAGE\n" +
			"web     running  a-lon…\n" +
			"a-ver…  stopped  -\n"},
		{"color", 40, true, "" +
			"ID                STATE    IMAGE\n" +
			"web               \x1b[32mrunning\x1b[0m  a-long-name-…\n" +
			"a-very-long-name  stopped  -\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var b strings.Builder
			if err := vms.write(&b, test.width, test.color); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, b.String()); diff != "" {
				t.Errorf("table (-want +got):\n%s", diff)
			}
		})
	}
}

// A paused VM is listed with why it is.
func TestPausedState(t *testing.T) {
	t.Parallel()
	for want, vm := range map[string]smolvm.VMInfo{
		"running": {State: smolvm.StateRunning},

		"running (unreachable)": {State: smolvm.StateRunning, Cause: "open the guest channel again: it did not answer"},
		"paused (by user)":      {State: smolvm.StatePaused},
		"paused (disk full)":    {State: smolvm.StatePaused, Cause: vmm.Halt{NoSpace: true}.Cause("/disk")},
		"paused (I/O error)":    {State: smolvm.StatePaused, Cause: vmm.Halt{Detail: "Input/output error"}.Cause("/disk")},
		"stopped":               {State: smolvm.StateStopped, Cause: "it was stopped by request"},
	} {
		if got := vmStateCell(vm); got.text != want || got.color != stateCell(vm.State).color {
			t.Errorf("state is %+v, want %q", got, want)
		}
	}
}

// What a guest says can't steer a terminal, nor break a table.
func TestTableOfGuestText(t *testing.T) {
	t.Parallel()
	events := &table{titles: []string{"DETAIL"}}
	events.add("panic:\x1b[2J\n  not syncing\x07")
	var b strings.Builder
	if err := events.write(&b, 0, true); err != nil {
		t.Fatal(err)
	}
	if want := "DETAIL\npanic: not syncing\uFFFD\n"; b.String() != want {
		t.Errorf("table is %q, want %q", b.String(), want)
	}
}

func TestProgressLine(t *testing.T) {
	t.Parallel()
	half := smolvm.Progress{Phase: "download kernel", Done: 5 << 20, Total: 10 << 20}
	tests := []struct {
		step  smolvm.Progress
		width int
		want  string
	}{
		{half, 80, "download kernel      [############------------] 5.0 MiB of 10.0 MiB"},
		{half, 40, "download kernel 5.0 MiB of 10.0 MiB"},
		{half, 30, "download … 5.0 MiB of 10.0 MiB"},
		{half, 10, "… 5.0 MiB…"},
		{smolvm.Progress{Phase: "unpack kernel"}, 80, "unpack kernel ..."},
		{smolvm.Progress{Phase: "copy", Done: 100}, 80, "copy 100 B"},
	}
	for _, test := range tests {
		if got := progressLine(test.step, test.width); got != test.want {
			t.Errorf("progressLine(%+v, %d) = %q, want %q", test.step, test.width, got, test.want)
		}
	}
}

// Elsewhere than on a terminal each phase is one line.
func TestProgressLog(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	p := newProgress(outputTo(&b, false))
	for _, step := range []smolvm.Progress{{Phase: "download"}, {Phase: "download", Done: 1, Total: 2}, {Phase: "unpack"}} {
		p.update(step)
	}
	p.finish()
	if want := "smolvm: download\nsmolvm: unpack\n"; b.String() != want {
		t.Errorf("progress is %q, want %q", b.String(), want)
	}
}

func TestFormats(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 59 * time.Second: "59s", 119 * time.Second: "119s",
		3 * time.Minute: "3m", 47 * time.Hour: "47h", 72 * time.Hour: "3d",
	} {
		if got := age(now.Add(-d), now); got != want {
			t.Errorf("age of %s = %q, want %q", d, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		1500 * time.Microsecond: "1.5 ms", 2340 * time.Millisecond: "2.34 s", 90 * time.Second: "1m30s",
	} {
		if got := took(d); got != want {
			t.Errorf("took(%s) = %q, want %q", d, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 5 << 40: "5.0 TiB", 5 << 50: "5120.0 TiB"} {
		if got := byteSize(n); got != want {
			t.Errorf("byteSize(%d) = %q, want %q", n, got, want)
		}
	}
	for n, want := range map[int]string{512: "512M", 1024: "1G", 1536: "1536M"} {
		if got := mebibytes(n); got != want {
			t.Errorf("mebibytes(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestBoots(t *testing.T) {
	for want, config := range map[string]smolvm.VMConfig{
		"python:3":     {Image: "python:3"},
		"0123456789ab": {Image: "sha256:" + strings.Repeat("0123456789abcdef", 4)},
		"vmlinux":      {KernelPath: "/boot/vmlinux"},
	} {
		if got := boots(config); got != want {
			t.Errorf("it boots %q, want %q", got, want)
		}
	}
}
