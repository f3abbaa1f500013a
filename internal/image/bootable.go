package image

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
)

var (
	// errNotKernel reports that a file is not a kernel that we know.
	errNotKernel = errors.New("is not a Linux kernel: neither ELF nor bzImage (x86-64) nor Image (arm64)")
	// errProgram reports that a file is an ELF file of another kind.
	errProgram = errors.New("is a program, not a kernel")
	// errNoEntry reports that a kernel can't be entered by QEMU.
	errNoEntry = errors.New("is an ELF file without the entry point that QEMU boots a kernel by (PVH); " +
		"give the kernel's bzImage, or build it with CONFIG_PVH=y")
	// errNotInitramfs reports that a file is not an initramfs.
	errNotInitramfs = errors.New("is not an initramfs: neither a cpio archive, nor packed as one may be, nor a file system")
)

// form is the form that a kernel comes in.
type form int

const (
	formELF    form = iota // booted as it is
	formImage              // arm64's, booted as it is
	formPacked             // a bzImage, which holds an ELF kernel
)

// arch returns the architecture whose kernels are in that form, as Go names it; empty where
// the file itself tells.
func (f form) arch() string {
	switch f {
	case formImage:
		return "arm64"
	case formPacked:
		return "amd64"
	case formELF:
	}
	return ""
}

// headSize is how much of a file's beginning tells a kernel's form, in bytes.
const headSize = payloadLengthAt + 4

// kernelForm finds out in which form a kernel is, and that this host's guests can boot it.
func kernelForm(r io.ReaderAt) (form, error) {
	head := make([]byte, headSize)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	head = head[:n]
	switch {
	case bytes.HasPrefix(head, []byte(elf.ELFMAG)):
		return formELF, checkELF(r)
	// See the kernel's Documentation/arch/arm64/booting.rst for the Image's mark.
	case n >= 0x40 && string(head[0x38:0x3c]) == "ARM\x64":
		return formImage, checkArch(formImage.arch())
	case hasSetupHeader(head):
		return formPacked, checkArch(formPacked.arch())
	}
	return 0, errNotKernel
}

// formOf finds out in which form the kernel in a file is; see [kernelForm].
func formOf(path string) (form, error) {
	file, err := openRegular(path, errNotKernel)
	if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }()
	found, err := kernelForm(file)
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return found, err
}

// openRegular opens a file; what is not a regular one fails with the error.
func openRegular(path string, not error) (*os.File, error) {
	// Before it is opened, which for a pipe would wait for a writer.
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w", path, not)
	}
	return os.Open(path)
}

// checkArch checks that guests on this host have that architecture, as Go names it.
func checkArch(arch string) error {
	if arch == runtime.GOARCH {
		return nil
	}
	return fmt.Errorf("is for %s; guests on this host are %s", arch, runtime.GOARCH)
}

// archOf returns the architecture of an ELF file, as Go names it where it does.
func archOf(machine elf.Machine) string {
	switch machine {
	case elf.EM_X86_64, elf.EM_386: // a 64-bit processor boots both
		return "amd64"
	case elf.EM_AARCH64:
		return "arm64"
	default:
		return machine.String()
	}
}

// checkELF checks that an ELF file is a kernel that QEMU boots. All that a kernel for
// VMs is known by is its note with the entry point.
func checkELF(r io.ReaderAt) error {
	file, err := elf.NewFile(r)
	if err != nil {
		return fmt.Errorf("is a damaged ELF file: %w", err)
	}
	for _, segment := range file.Progs {
		if segment.Type == elf.PT_INTERP {
			return errProgram
		}
	}
	if err := checkArch(archOf(file.Machine)); err != nil {
		return err
	}
	if file.Machine == elf.EM_AARCH64 || hasPVHNote(file) {
		return nil
	}
	return errNoEntry
}

const (
	// pvhNote is XEN_ELFNOTE_PHYS32_ENTRY of the kernel's include/xen/interface/elfnote.h.
	pvhNote = 18
	// maxNotes bounds what is read of a kernel's notes, in bytes; Debian's has 500.
	maxNotes = 1 << 20
)

// hasPVHNote reports whether a kernel says where a VMM enters it.
func hasPVHNote(file *elf.File) bool {
	for _, segment := range file.Progs {
		if segment.Type != elf.PT_NOTE {
			continue
		}
		notes, err := io.ReadAll(io.LimitReader(segment.Open(), maxNotes))
		if err != nil {
			return false
		}
		align := uint64(4)
		if segment.Align == 8 {
			align = 8
		}
		for len(notes) >= 12 {
			nameLen, length := file.ByteOrder.Uint32(notes), file.ByteOrder.Uint32(notes[4:])
			end := roundUp(12+uint64(nameLen), align)
			if file.ByteOrder.Uint32(notes[8:]) == pvhNote && uint64(len(notes)) >= 16 && string(notes[12:16]) == "Xen\x00" {
				return true
			}
			end = roundUp(end+uint64(length), align)
			if end > uint64(len(notes)) {
				break
			}
			notes = notes[end:]
		}
	}
	return false
}

func roundUp(n, to uint64) uint64 { return (n + to - 1) / to * to }

// checkRootfs checks that a path is a root file system for this host's guests: a disk
// image, or a directory whose shell, if it has one, runs there.
func checkRootfs(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return checkTree(path)
	}
	// It is raw, whatever a guest has written into its disk.
	_, err = disk.Declare(path, "")
	if errors.Is(err, disk.ErrUndeclared) {
		return &smolvm.Error{Hint: fmt.Sprintf("`qemu-img convert -O raw %s …` makes one", path),
			Err: fmt.Errorf("%s looks like qcow2, and an image is made of a raw disk", path)}
	}
	if errors.Is(err, disk.ErrNoFileSystem) && isArchive(path) {
		return fmt.Errorf("%s: is an archive; unpack it into a directory, as root so that owners are kept, and give that", path)
	}
	return err
}

// isArchive reports whether a file is a tar archive, or packed as one often is.
func isArchive(path string) bool {
	file, err := os.Open(path)
	if err != nil {
		return false
	}
	defer func() { _ = file.Close() }()
	const tarMarkAt = 257 // of POSIX's header
	head := make([]byte, tarMarkAt+5)
	n, _ := file.ReadAt(head, 0)
	head = head[:n]
	return n == cap(head) && string(head[tarMarkAt:]) == "ustar" ||
		bytes.HasPrefix(head, []byte("\x1f\x8b")) || bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")) ||
		bytes.HasPrefix(head, []byte("\x28\xb5\x2f\xfd")) || bytes.HasPrefix(head, []byte("BZh"))
}

// checkTree checks that a tree's shell, if it is there, is a program of this host's
// architecture. Links in the tree are followed within it.
func checkTree(path string) error {
	root, err := os.OpenRoot(path)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	for _, name := range []string{"bin/busybox", "usr/bin/busybox", "bin/bash", "usr/bin/bash", "bin/dash", "usr/bin/dash"} {
		if info, err := root.Lstat(name); err != nil || !info.Mode().IsRegular() {
			continue // an absolute link leads out of the root here, as it would not in the guest
		}
		file, err := root.Open(name)
		if err != nil {
			continue // of another user: what can't be read is found later
		}
		program, err := elf.NewFile(file)
		if err == nil {
			err = checkArch(archOf(program.Machine))
			if err != nil {
				err = fmt.Errorf("%s: /%s %w", path, name, err)
			}
		} else {
			err = nil // a script
		}
		return errors.Join(err, file.Close())
	}
	return nil
}

// CheckInitramfs checks that a file begins as an initramfs, or an old initial RAM disk,
// may begin; see the kernel's Documentation/driver-api/early-userspace and lib/decompress.c.
func (*Store) CheckInitramfs(path string) error {
	file, err := openRegular(path, errNotInitramfs)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	head := make([]byte, 2048)
	n, err := file.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if !isInitramfs(head[:n]) {
		return fmt.Errorf("%s: %w", path, errNotInitramfs)
	}
	return nil
}

func isInitramfs(head []byte) bool {
	for _, mark := range []string{
		"070701", "070702", // cpio
		"\x1f\x8b", "\x1f\x9e", "BZh", "\x5d\x00\x00", "\xfd7zXZ\x00", "\x89LZO", "\x02\x21\x4c\x18", "\x28\xb5\x2f\xfd", // packed
		"hsqs", "-rom1fs-", "\x45\x3d\xcd\x28", // squashfs, romfs, cramfs
		"\x00\x00\x00\x00", // the kernel passes over zeros, and ext2 begins with them
	} {
		if bytes.HasPrefix(head, []byte(mark)) {
			return true
		}
	}
	return len(head) > 0x43a && binary.LittleEndian.Uint16(head[0x438:]) == 0xef53 // ext2 behind a boot block
}
