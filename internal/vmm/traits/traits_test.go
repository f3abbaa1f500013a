package traits

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm"
)

func TestAll(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{Auto: true, "": true}
	for _, one := range All() {
		if seen[one.Name] {
			t.Errorf("the name %q is taken", one.Name)
		}
		seen[one.Name] = true
		if len(one.Programs) == 0 || len(one.DiskFormats) == 0 || len(one.Accelerators) == 0 || one.Layout == 0 {
			t.Errorf("%s declares %+v", one.Name, one)
		}
		if got, err := Lookup(one.Name); err != nil || got.Name != one.Name {
			t.Errorf("Lookup(%q) = %+v, %v", one.Name, got, err)
		}
	}
}

func TestLookupOfUnknown(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "xen", "QEMU", Auto} {
		_, err := Lookup(name)
		if !errors.Is(err, smolvm.ErrUnknownBackend) || smolvm.CodeOf(err) != smolvm.CodeUnknownBackend {
			t.Errorf("Lookup(%q): %v", name, err)
		}
		if hint := smolvm.HintOf(err); !strings.Contains(hint, "auto, firecracker, qemu") {
			t.Errorf("Lookup(%q) has the hint %q", name, hint)
		}
	}
}

func TestFirst(t *testing.T) {
	t.Parallel()
	all := List{{Name: "first"}, {Name: "second"}}
	for name, test := range map[string]struct {
		lacking []string
		want    string
	}{
		"both can":    {nil, "first"},
		"one can":     {[]string{"first"}, "second"},
		"another can": {[]string{"second"}, "first"},
		"none can":    {[]string{"first", "second"}, ""},
	} {
		lacks := func(t vmm.Traits) []smolvm.Finding {
			if slices.Contains(test.lacking, t.Name) {
				return []smolvm.Finding{{Name: t.Name + "-program", Problem: "not installed", Severity: smolvm.SeverityError}}
			}
			return nil
		}
		got, err := all.First(lacks)
		if got.Name != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%s: First = %q, %v", name, got.Name, err)
		}
		if err == nil {
			continue
		}
		missing, ok := errors.AsType[*smolvm.PrerequisiteError](err)
		if !ok || len(missing.Findings) != len(all) {
			t.Errorf("%s: the error is %#v, without a reason for each", name, err)
		}
	}
}

func TestAccelerator(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		can, has []string
		want     string
	}{
		"the best":            {[]string{vmm.KVM, vmm.TCG}, []string{vmm.TCG, vmm.KVM}, vmm.KVM},
		"what the host has":   {[]string{vmm.KVM, vmm.TCG}, []string{vmm.TCG}, vmm.TCG},
		"what it prefers":     {[]string{vmm.TCG, vmm.KVM}, []string{vmm.TCG, vmm.KVM}, vmm.TCG},
		"nothing that it has": {[]string{vmm.KVM}, []string{vmm.TCG}, ""},
	} {
		has := func(name string) bool {
			return slices.Contains(test.has, name)
		}
		if got, ok := Accelerator(vmm.Traits{Accelerators: test.can}, has); got != test.want || ok != (test.want != "") {
			t.Errorf("%s: Accelerator = %q, %v", name, got, ok)
		}
	}
}

// A backend is asked for only if it can do what the VM needs.
func TestAble(t *testing.T) {
	t.Parallel()
	raw, both := vmm.Traits{Name: "raw", DiskFormats: []string{"raw"}}, vmm.Traits{Name: "both", DiskFormats: []string{"qcow2", "raw"}}
	for name, test := range map[string]struct {
		needs Needs
		want  string
	}{
		"nothing":             {Needs{}, "raw both"},
		"what all can":        {Needs{DiskFormats: []string{"raw"}}, "raw both"},
		"what one can":        {Needs{DiskFormats: []string{"raw", "qcow2"}}, "both"},
		"what nobody can":     {Needs{DiskFormats: []string{"vmdk"}}, ""},
		"a raw disk":          {Needs{OwnFormat: "raw"}, "raw"},
		"a qcow2 disk":        {Needs{OwnFormat: "qcow2"}, "both"},
		"raw, and qcow2 ones": {Needs{OwnFormat: "raw", DiskFormats: []string{"qcow2"}}, ""},
	} {
		needs := test.needs
		var names []string
		for _, t := range (List{raw, both}).Able(needs) {
			names = append(names, t.Name)
		}
		if got := strings.Join(names, " "); got != test.want {
			t.Errorf("%s: able are %q, want %q", name, got, test.want)
		}
		if got := needs.Unmet(raw); (got == "") != strings.Contains(test.want, "raw") {
			t.Errorf("%s: one lacks %q", name, got)
		}
	}
}

func TestWith(t *testing.T) {
	t.Parallel()
	all := List{{Name: "a", Layout: 1}, {Name: "b", Layout: 1}}
	with := all.With(vmm.Traits{Name: "b", Layout: 2}, vmm.Traits{Name: "c", Layout: 3})
	for name, want := range map[string]int{"a": 1, "b": 2, "c": 3} {
		if got, err := with.Lookup(name); err != nil || got.Layout != want {
			t.Errorf("%s is %+v, %v", name, got, err)
		}
	}
	if len(with) != 3 || all[1].Layout != 1 {
		t.Errorf("they are %+v, of %+v", with, all)
	}
}
