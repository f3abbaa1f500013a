package manager_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/smolvm/smolvm"
)

// VMs are found by ids, patterns, labels and images, and keep their labels (M3).
func TestListOptions(t *testing.T) {
	t.Parallel()
	m := openEmpty(t)
	for id, labels := range map[string]map[string]string{
		"web-1": {"team": "blue", "job": "1"},
		"web_2": {"team": "blue", "job": "2"},
		"db":    {"team": ""},
		"plain": nil,
	} {
		config := withoutImage(t, id)
		config.Labels = labels
		mustCreate(t, m, config)
	}
	for name, test := range map[string]struct {
		options smolvm.ListOptions
		want    []string
	}{
		"all":              {smolvm.ListOptions{}, []string{"db", "plain", "web-1", "web_2"}},
		"ids":              {smolvm.ListOptions{IDs: []string{"db", "nosuch", "plain"}}, []string{"db", "plain"}},
		"pattern":          {smolvm.ListOptions{IDs: []string{"web?[12]"}}, []string{"web-1", "web_2"}},
		"label":            {smolvm.ListOptions{Labels: map[string]string{"team": "blue"}}, []string{"web-1", "web_2"}},
		"labels":           {smolvm.ListOptions{Labels: map[string]string{"team": "blue", "job": "2"}}, []string{"web_2"}},
		"empty label":      {smolvm.ListOptions{Labels: map[string]string{"team": ""}}, []string{"db"}},
		"no such label":    {smolvm.ListOptions{Labels: map[string]string{"none": ""}}, nil},
		"image":            {smolvm.ListOptions{Image: "base"}, nil},
		"state":            {smolvm.ListOptions{State: smolvm.StateRunning}, nil},
		"several of these": {smolvm.ListOptions{IDs: []string{"web*"}, State: smolvm.StateCreated, Labels: map[string]string{"job": "1"}}, []string{"web-1"}},
	} {
		t.Run(name, func(t *testing.T) {
			vms, err := m.List(t.Context(), test.options)
			if err != nil {
				t.Fatal(err)
			}
			var ids []string
			for _, vm := range vms {
				ids = append(ids, vm.ID)
			}
			slices.Sort(ids)
			if !slices.Equal(ids, test.want) {
				t.Errorf("VMs %q, want %q", ids, test.want)
			}
		})
	}
	var invalid *smolvm.ValidationError
	if _, err := m.List(t.Context(), smolvm.ListOptions{IDs: []string{"["}}); !errors.As(err, &invalid) {
		t.Errorf("a bad pattern: %v", err)
	}
	// What a caller changes of one VM is not another's.
	first, err := m.Get(t.Context(), "web-1")
	if err != nil {
		t.Fatal(err)
	}
	first.Config.Labels["team"] = "changed"
	if again, err := m.Get(t.Context(), "web-1"); err != nil || again.Config.Labels["team"] != "blue" {
		t.Errorf("labels are %v, %v", again.Config.Labels, err)
	}
}
