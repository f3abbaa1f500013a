package image

import (
	"bytes"
	"debug/elf"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm/internal/image/imagetest"
)

// armImage is a kernel as arm64 has it.
func armImage() []byte {
	image := make([]byte, 128)
	copy(image[0x38:], "ARM\x64")
	return image
}

// What is no kernel that can be booted here is refused before anything is made of it
// (case 29).
func TestKernelForm(t *testing.T) {
	t.Parallel()
	program, err := os.ReadFile("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/proc/self/exe") // linked statically, and so without an interpreter
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		file []byte
		want string // the error; empty: none
	}{
		"kernel":               {imagetest.TinyKernel(), ""},
		"32 bits":              {imagetest.Kernel(elf.EM_386, true), ""},
		"bzImage":              {bzImage(4, 0x20f, gzipped(t)), ""},
		"no entry point":       {imagetest.Kernel(elf.EM_X86_64, false), "CONFIG_PVH"},
		"another processor":    {imagetest.Kernel(elf.EM_RISCV, true), "is for EM_RISCV; guests on this host are amd64"},
		"arm64, ELF":           {imagetest.Kernel(elf.EM_AARCH64, true), "is for arm64"},
		"arm64, Image":         {armImage(), "is for arm64"},
		"a program":            {program, "is a program"},
		"a static program":     {self, "is a"},
		"text":                 {[]byte("hello"), "is not a Linux kernel"},
		"empty":                {nil, "is not a Linux kernel"},
		"mark only":            {[]byte(elf.ELFMAG), "damaged"},
		"notes beyond the end": {imagetest.TinyKernel()[:130], "CONFIG_PVH"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := kernelForm(bytes.NewReader(test.file))
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
		})
	}
}

// A bzImage whose kernel can't be entered otherwise is kept as it is.
func TestPackedKernelWithoutEntry(t *testing.T) {
	t.Parallel()
	packed := bzImage(4, 0x20f, gzipOf(t, imagetest.Kernel(elf.EM_X86_64, false)))
	path := filepath.Join(t.TempDir(), "bzImage")
	if err := os.WriteFile(path, packed, 0o600); err != nil {
		t.Fatal(err)
	}
	store, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	kept, err := store.Kernel(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if content, err := os.ReadFile(kept); err != nil || !bytes.Equal(content, packed) {
		t.Errorf("what is kept is not the bzImage (%v)", err)
	}
}

func TestCheckInitramfs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ext2 := make([]byte, 2048)
	ext2[0], ext2[0x438], ext2[0x439] = 1, 0x53, 0xef
	var store *Store
	for name, test := range map[string]struct {
		file []byte
		ok   bool
	}{
		"cpio":           {[]byte(imagetest.Initramfs), true},
		"gzip":           {gzipped(t), true},
		"zstd":           {zstandard(t), true},
		"lz4":            {lz4Legacy(t), true},
		"zeros":          {append(make([]byte, 512), imagetest.Initramfs...), true},
		"ext2":           {ext2, true},
		"text":           {[]byte("not an initramfs"), false},
		"empty":          {nil, false},
		"kernel":         {imagetest.TinyKernel(), false},
		"too short cpio": {[]byte("0707"), false},
	} {
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, test.file, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := store.CheckInitramfs(path); (err == nil) != test.ok || err != nil && !errors.Is(err, errNotInitramfs) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := store.CheckInitramfs(dir); !errors.Is(err, errNotInitramfs) {
		t.Errorf("directory: %v", err)
	}
	if err := store.CheckInitramfs(filepath.Join(dir, "no")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

func TestCheckRootfs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	put := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, content, 0o755)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	put("native/bin/busybox", imagetest.TinyKernel())
	put("script/bin/bash", []byte("#!/bin/busybox sh\n"))
	put("arm/usr/bin/dash", imagetest.Kernel(elf.EM_AARCH64, true))
	put("bare/file", nil)
	tar := make([]byte, 1024)
	copy(tar[257:], "ustar")
	for path, want := range map[string]string{
		filepath.Join(dir, "native"): "",
		filepath.Join(dir, "script"): "",
		filepath.Join(dir, "bare"):   "",
		filepath.Join(dir, "arm"):    "arm: /usr/bin/dash is for arm64",
		filepath.Join(dir, "no"):     "no such file",
		put("text", []byte("hello")): "no file system",
		put("tar", tar):              "is an archive",
		put("tgz", gzipped(t)):       "is an archive",
	} {
		err := checkRootfs(path)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error is %v, want %q", path, err, want)
		}
	}
}
