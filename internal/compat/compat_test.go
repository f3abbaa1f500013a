package compat_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/compat"
)

func TestCheck(t *testing.T) {
	for number, ok := range map[int]bool{0: true, 1: true, 2: true, 3: false, 1 << 40: false} {
		err := compat.Check("the thing", number, 2)
		if ok != (err == nil) {
			t.Errorf("%d: %v", number, err)
		}
		if !ok && (!errors.Is(err, smolvm.ErrUnsupported) || !strings.Contains(err.Error(), "the thing") || smolvm.HintOf(err) == "") {
			t.Errorf("%d: %v, hint %q", number, err, smolvm.HintOf(err))
		}
	}
}
