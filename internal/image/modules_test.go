package image

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// module is an ELF file with nothing in it but that it depends on others.
func module(depends string) []byte {
	info := []byte("license=GPL\x00depends=" + depends + "\x00name=x\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	const headerSize, sectionSize = 64, 64
	le := binary.LittleEndian
	file := make([]byte, headerSize)
	copy(file, "\x7fELF\x02\x01\x01")
	le.PutUint16(file[16:], 1)  // relocatable
	le.PutUint16(file[18:], 62) // x86-64
	le.PutUint32(file[20:], 1)
	le.PutUint64(file[40:], uint64(headerSize+len(info)+len(names)))
	le.PutUint16(file[52:], headerSize)
	le.PutUint16(file[58:], sectionSize)
	le.PutUint16(file[60:], 3)
	le.PutUint16(file[62:], 2)
	section := func(name, kind uint32, offset, size int) []byte {
		s := make([]byte, sectionSize)
		le.PutUint32(s, name)
		le.PutUint32(s[4:], kind)
		le.PutUint64(s[24:], uint64(offset))
		le.PutUint64(s[32:], uint64(size))
		return s
	}
	return bytes.Join([][]byte{
		file, info, names,
		make([]byte, sectionSize),
		section(1, 1, headerSize, len(info)),
		section(10, 3, headerSize+len(info), len(names)),
	}, nil)
}

func moduleTree(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func loadOrder(t *testing.T, dir string) ([]wire.Module, error) {
	t.Helper()
	set, err := findModules(dir)
	if err != nil {
		return nil, err
	}
	order, contents, err := set.loadOrder()
	if err == nil && len(contents) != len(order) {
		t.Errorf("%d modules, %d files", len(order), len(contents))
	}
	return order, err
}

func TestLoadOrder(t *testing.T) {
	boot := func(name, transport string) wire.Module {
		return wire.Module{Path: "/lib/smolvm/" + name + ".ko", Transport: transport, Use: wire.UseBoot}
	}
	late := func(name string) wire.Module {
		return wire.Module{Path: "/lib/smolvm/" + name + ".ko", Use: wire.UseLate}
	}
	of := func(use, name, transport string) wire.Module {
		return wire.Module{Path: "/lib/smolvm/" + name + ".ko", Transport: transport, Use: use}
	}
	tests := map[string]struct {
		files map[string][]byte
		want  []wire.Module
	}{
		"none": {want: []wire.Module{}},
		"all built in": {
			files: map[string][]byte{"modules.builtin": []byte("kernel/drivers/virtio/virtio_blk.ko\n"), "kernel/virtio_blk.ko": module("")},
			want:  []wire.Module{},
		},
		"dependencies first": {
			files: map[string][]byte{
				"a/virtio_blk.ko": module("virtio,virtio_ring"), "a/virtio.ko": module(""), "b/virtio_ring.ko": module("virtio"),
				"unwanted.ko": []byte("not even read"),
			},
			want: []wire.Module{boot("virtio", ""), boot("virtio_ring", ""), boot("virtio_blk", "")},
		},
		"dependency built in": {
			files: map[string][]byte{"modules.builtin": []byte("kernel/virtio.ko\n"), "virtio_blk.ko": module("virtio")},
			want:  []wire.Module{boot("virtio_blk", "")},
		},
		"dashes": {
			files: map[string][]byte{"virtio-rng.ko": module("rng-core"), "rng-core.ko": module("")},
			want:  []wire.Module{late("rng_core"), late("virtio_rng")},
		},
		"one bus": {
			files: map[string][]byte{"virtio_mmio.ko": module("virtio_ring"), "virtio_ring.ko": module("virtio"), "virtio.ko": module("")},
			want:  []wire.Module{boot("virtio", "mmio"), boot("virtio_ring", "mmio"), boot("virtio_mmio", "mmio")},
		},
		"both buses, by way of another": {
			files: map[string][]byte{
				"virtio_mmio.ko": module("virtio_ring"), "virtio_pci.ko": module("virtio_ring"),
				"virtio_ring.ko": module("virtio"), "virtio.ko": module(""),
			},
			want: []wire.Module{boot("virtio", ""), boot("virtio_ring", ""), boot("virtio_mmio", "mmio"), boot("virtio_pci", "pci")},
		},
		"the guest channel's": {
			files: map[string][]byte{
				"virtio_console.ko": module("virtio"), "virtio.ko": module(""), "virtio_net.ko": module("virtio,crc"), "crc.ko": module(""),
				"vsock.ko": module("crc"), "vmw_vsock_virtio_transport.ko": module("vmw_vsock_virtio_transport_common,virtio"),
				"vmw_vsock_virtio_transport_common.ko": module("vsock"), "virtio_mmio.ko": module(""), "vsock_loopback.ko": module("vsock"),
			},
			// What both need, or one that is needed in any case, is loaded in any case.
			want: []wire.Module{
				boot("virtio_mmio", "mmio"), boot("virtio", ""), of(wire.UsePort, "virtio_console", ""), boot("crc", ""),
				of(wire.UseVsock, "vsock", ""), of(wire.UseVsock, "vmw_vsock_virtio_transport_common", ""),
				of(wire.UseVsock, "vmw_vsock_virtio_transport", ""), late("virtio_net"),
			},
		},
		"compressed": {
			files: map[string][]byte{"virtio_blk.ko.gz": gzipOf(t, module("virtio")), "virtio.ko": module("")},
			want:  []wire.Module{boot("virtio", ""), boot("virtio_blk", "")},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := loadOrder(t, moduleTree(t, test.files))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error("order differs (- want, + got):\n" + diff)
			}
		})
	}
}

func TestLoadOrderRefuses(t *testing.T) {
	tests := map[string]struct {
		files map[string][]byte
		want  string
	}{
		"a dependency that is missing": {map[string][]byte{"virtio_blk.ko": module("virtio")}, "virtio_blk needs another: module virtio is neither there"},
		"no ELF file":                  {map[string][]byte{"virtio_blk.ko": []byte("hello")}, "packed in a way that is not known"},
		"cut short":                    {map[string][]byte{"virtio_blk.ko": module("")[:100]}, "module virtio_blk"},
		"two kernels":                  {map[string][]byte{"1/modules.builtin": []byte("a.ko\n"), "2/modules.builtin": []byte("a.ko\n")}, "several kernels"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := loadOrder(t, moduleTree(t, test.files))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
		})
	}
}

func FuzzDependencies(f *testing.F) {
	f.Add(module("a,b-c"))
	f.Add(module(""))
	f.Fuzz(func(_ *testing.T, file []byte) { _, _ = dependencies(file) })
}
