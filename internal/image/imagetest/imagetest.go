// Package imagetest makes files that pass for a kernel and an initramfs wherever none
// is run. Only tests import it.
package imagetest

import (
	"debug/elf"
	"encoding/binary"
)

// Initramfs is an empty cpio archive: its header and trailer, in the kernel's newc format.
const Initramfs = "07070100000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000B00000000TRAILER!!!\x00\x00\x00\x00"

// Sizes of the parts of an ELF file of 64 bits.
const (
	headerSize  = 64
	segmentSize = 56
)

// Kernel returns an ELF file for a processor, with the note that tells a VMM where to
// enter it (PVH) if pvh is set, and some code.
func Kernel(machine elf.Machine, pvh bool) []byte {
	// A note is three lengths, a name, and what it has to say, all in words; 18 is
	// XEN_ELFNOTE_PHYS32_ENTRY in the kernel's include/xen/interface/elfnote.h.
	note := make([]byte, 0, 20)
	note = binary.LittleEndian.AppendUint32(note, 4)
	note = binary.LittleEndian.AppendUint32(note, 4)
	note = binary.LittleEndian.AppendUint32(note, 18)
	note = append(note, "Xen\x00"...)
	note = binary.LittleEndian.AppendUint32(note, 0x1000000)
	if !pvh {
		note[8]++
	}
	file := append([]byte(elf.ELFMAG), byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT))
	file = append(file, make([]byte, headerSize-len(file))...)
	binary.LittleEndian.PutUint16(file[16:], uint16(elf.ET_EXEC))
	binary.LittleEndian.PutUint16(file[18:], uint16(machine))
	binary.LittleEndian.PutUint32(file[20:], uint32(elf.EV_CURRENT))
	binary.LittleEndian.PutUint64(file[32:], headerSize) // where the segments are listed
	binary.LittleEndian.PutUint16(file[52:], headerSize)
	binary.LittleEndian.PutUint16(file[54:], segmentSize)
	binary.LittleEndian.PutUint16(file[56:], 1) // one segment
	binary.LittleEndian.PutUint16(file[58:], 64)
	segment := make([]byte, segmentSize)
	binary.LittleEndian.PutUint32(segment[0:], uint32(elf.PT_NOTE))
	binary.LittleEndian.PutUint64(segment[8:], headerSize+segmentSize)
	binary.LittleEndian.PutUint64(segment[32:], uint64(len(note)))
	binary.LittleEndian.PutUint64(segment[40:], uint64(len(note)))
	binary.LittleEndian.PutUint64(segment[48:], 4)
	file = append(append(file, segment...), note...)
	// Calls, which the x86 filter of xz rewrites, show whether that is undone.
	for i := range 500 {
		file = append(file, 0xe8, byte(i), byte(i>>8), 0, 0, 0x90, 0x90)
	}
	return file
}

// TinyKernel returns a [Kernel] that the default backend boots on x86-64.
func TinyKernel() []byte { return Kernel(elf.EM_X86_64, true) }
