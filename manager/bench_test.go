package manager_test

import (
	"testing"

	"github.com/smolvm/smolvm"
)

func BenchmarkCreate(b *testing.B) {
	m := openReal(b)
	for b.Loop() {
		if _, err := m.Create(b.Context(), smolvm.VMConfig{}, smolvm.CreateOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	m := openReal(b)
	vm := mustRun(b, m, smolvm.VMConfig{})
	for b.Loop() {
		if _, err := m.Get(b.Context(), vm.ID); err != nil {
			b.Fatal(err)
		}
	}
}
