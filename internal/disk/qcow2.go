package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The qcow2 format, as in QEMU's docs/interop/qcow2.
const (
	qcow2Magic        = "QFI\xfb"
	qcow2HeaderV2Size = 72
	qcow2HeaderSize   = 104 // of version 3
	clusterBits       = 16
	clusterSize       = 1 << clusterBits
	// perL1Entry is what an entry of the L1 table stands for, in bytes: an L2 table is a
	// cluster of 8-byte entries, each for a cluster of data.
	perL1Entry = clusterSize / 8 * clusterSize
	// Header extensions: the backing file's format, and the end of the list.
	extensionBackingFormat = 0xe2792aca
	extensionEnd           = 0
	// refcountOrder 4: refcounts of 16 bits.
	refcountOrder = 4
	// maxOverlay is the largest disk that QEMU opens with clusters of this size
	// (QCOW_MAX_L1_SIZE in its block/qcow2.h), in bytes: 2 PiB.
	maxOverlay = 2 << 50
	// maxBackingName is the longest name of a backing file.
	maxBackingName = 1023
)

// Incompatible features of a qcow2 disk: who does not know one must not open it.
const (
	featureDirty        = 1 << 0
	featureCorrupt      = 1 << 1
	featureDataFile     = 1 << 2
	featureCompression  = 1 << 3
	featureExtendedL2   = 1 << 4
	harmlessFeatures    = featureDirty | featureCompression | featureExtendedL2
	explainableFeatures = featureCorrupt | featureDataFile
)

// header is what the header of a qcow2 disk says.
type header struct {
	size, features                      uint64
	encryption, snapshots               uint32
	l1Entries, clusterBits              uint32
	l1Offset                            uint64
	backing, backingFormat              string
	version, backingLength, extensionAt uint32
	backingOffset                       uint64
}

// readHeader reads the header of a qcow2 disk.
func readHeader(r io.ReaderAt) (header, error) {
	text := make([]byte, qcow2HeaderSize)
	n, err := r.ReadAt(text, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return header{}, err
	}
	if n < len(qcow2Magic) || string(text[:len(qcow2Magic)]) != qcow2Magic {
		return header{}, errors.New("is no qcow2 disk")
	}
	if n < qcow2HeaderV2Size {
		return header{}, errors.New("is a qcow2 disk that ends within its header")
	}
	be := binary.BigEndian
	h := header{
		version: be.Uint32(text[4:]), backingOffset: be.Uint64(text[8:]), backingLength: be.Uint32(text[16:]),
		size: be.Uint64(text[24:]), encryption: be.Uint32(text[32:]), l1Entries: be.Uint32(text[36:]),
		l1Offset: be.Uint64(text[40:]), clusterBits: be.Uint32(text[20:]), snapshots: be.Uint32(text[60:]), extensionAt: qcow2HeaderV2Size,
	}
	switch {
	case h.version != 2 && h.version != 3:
		return header{}, fmt.Errorf("is a qcow2 disk of version %d; 2 and 3 are known", h.version)
	case h.version == 3 && n < qcow2HeaderSize:
		return header{}, errors.New("is a qcow2 disk that ends within its header")
	case h.size > 1<<62:
		return header{}, fmt.Errorf("is a qcow2 disk with an impossible size of %d bytes", h.size)
	}
	if h.version == 3 {
		h.features, h.extensionAt = be.Uint64(text[72:]), be.Uint32(text[100:])
	}
	return h, h.readBacking(r)
}

// readBacking reads the name of the file that the disk is an overlay of, and its format.
func (h *header) readBacking(r io.ReaderAt) error {
	if h.backingOffset == 0 {
		return nil
	}
	if h.backingLength > maxBackingName || h.backingOffset > 1<<30 || h.extensionAt > clusterSize {
		return errors.New("is a qcow2 disk with an impossible backing file")
	}
	name := make([]byte, h.backingLength)
	if _, err := r.ReadAt(name, int64(h.backingOffset)); err != nil {
		return fmt.Errorf("is a qcow2 disk that ends within the name of its backing file: %w", err)
	}
	h.backing = string(name)
	for at := int64(h.extensionAt); at < clusterSize; {
		var head [8]byte
		if _, err := r.ReadAt(head[:], at); err != nil {
			return nil //nolint:nilerr // there are no more
		}
		kind, length := binary.BigEndian.Uint32(head[:]), int64(binary.BigEndian.Uint32(head[4:]))
		switch {
		case kind == extensionEnd || length > clusterSize:
			return nil
		case kind == extensionBackingFormat && length <= maxBackingName:
			format := make([]byte, length)
			if _, err := r.ReadAt(format, at+8); err == nil {
				h.backingFormat = string(format)
			}
		}
		at += 8 + roundUp(length, 8)
	}
	return nil
}

// foreign returns why a disk that comes from outside must not be opened: all by which a
// header makes a VMM open other files, or that is not known to be harmless. Based says that
// the file which it is based on was named.
func (h *header) foreign(based bool) error {
	switch {
	case h.backingOffset != 0 && !based:
		return fmt.Errorf("is based on another file (%q), which was not named; name that, and its format, or make one with `qemu-img convert -O qcow2` that is not", h.backing)
	case h.backingOffset == 0 && based:
		return errors.New("is not based on another file, but one was named")
	case h.features&featureDataFile != 0:
		return errors.New("keeps its data in another file, which was not named; `qemu-img convert -O qcow2` makes one that does not")
	case h.features&featureCorrupt != 0:
		return errors.New("is marked as corrupt; `qemu-img check -r all` may repair it")
	case h.features&^(harmlessFeatures|explainableFeatures) != 0:
		return fmt.Errorf("has features that are not known (%#x)", h.features)
	case h.encryption != 0:
		return errors.New("is encrypted, which is not supported")
	case h.snapshots != 0:
		return errors.New("has snapshots in it, which is not supported; `qemu-img convert -O qcow2` makes one that has not")
	}
	return nil
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }
