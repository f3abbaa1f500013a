package manager_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

// What goes wrong in the process of a background task is the same error here.
func TestTaskErrors(t *testing.T) {
	t.Parallel()
	config := useFake(t)
	config.Templates = manager.TemplateConfig{}
	config.DiskReserve = 1 << 60 // more than any disk has; it is the task that looks
	m := openAt(t, config)
	_, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{})
	if !errors.Is(err, smolvm.ErrDiskBudget) || smolvm.CodeOf(err) != smolvm.CodeNoRoom || !strings.Contains(err.Error(), "build template") {
		t.Errorf("a template without room: %v", err)
	}
	pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 1})
	if !errors.Is(err, smolvm.ErrDiskBudget) {
		t.Errorf("a pool without room: %+v, %v", pool, err)
	}
	pools, err := m.Pools(t.Context()) // it is to be filled when there is room
	if err != nil || len(pools) != 1 {
		t.Fatalf("pools are %+v, %v", pools, err)
	}
	if err := m.RemovePool(t.Context(), pools[0].ID); err != nil {
		t.Error(err)
	}
}
