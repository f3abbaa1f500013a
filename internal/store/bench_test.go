package store

import (
	"fmt"
	"path/filepath"
	"testing"
)

// fill opens a store with some VMs in it.
func fill(b *testing.B, count int) *Store {
	b.Helper()
	s, err := Open(b.Context(), filepath.Join(b.TempDir(), "smolvm.db"), Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	for i := range count {
		if _, err := s.CreateVM(b.Context(), newVM(fmt.Sprintf("vm-%d", i))); err != nil {
			b.Fatal(err)
		}
	}
	return s
}

func BenchmarkOpen(b *testing.B) {
	path := fill(b, 10).Path()
	for b.Loop() {
		s, err := Open(b.Context(), path, Options{})
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCreate(b *testing.B) {
	for _, present := range []int{0, 10000} {
		b.Run(fmt.Sprintf("present=%d", present), func(b *testing.B) {
			s := fill(b, present)
			n := 0
			for b.Loop() {
				n++
				if _, err := s.CreateVM(b.Context(), newVM(fmt.Sprintf("new-%d", n))); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkGet(b *testing.B) {
	s := fill(b, 1000)
	for b.Loop() {
		if _, err := s.GetVM(b.Context(), "vm-500"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkList10000(b *testing.B) {
	s := fill(b, 10000)
	for b.Loop() {
		vms, err := s.ListVMs(b.Context(), "")
		if err != nil || len(vms) != 10000 {
			b.Fatal(len(vms), err)
		}
	}
}
