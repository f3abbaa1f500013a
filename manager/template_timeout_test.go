package manager_test

import (
	"errors"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
)

// A template's VM that takes too long is given up, and leaves nothing.
func TestTemplateTimeout(t *testing.T) {
	t.Parallel()
	m := openFakeFast(t)
	if _, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{Timeout: time.Nanosecond}); !errors.Is(err, smolvm.ErrBootTimeout) {
		t.Errorf("BuildTemplate: %v", err)
	}
	if templates, err := m.Templates(t.Context()); err != nil || len(templates) > 0 {
		t.Errorf("templates: %+v, %v", templates, err)
	}
}
