package image

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"
)

// Offsets in a bzImage; see the kernel's Documentation/arch/x86/boot.rst.
const (
	setupSectorsAt  = 0x1f1
	setupMagicAt    = 0x202
	bootVersionAt   = 0x206
	payloadOffsetAt = 0x248
	payloadLengthAt = 0x24c
	setupMagic      = "HdrS"
	// payloadVersion is the first boot protocol that tells where the payload is.
	payloadVersion = 0x0208
	sectorSize     = 512
	// maxKernel bounds an unpacked kernel, in bytes.
	maxKernel = 1 << 30
)

// unpackKernel writes the ELF kernel that a bzImage holds in compressed form.
// Booting it saves the guest the unpacking, and Firecracker takes nothing else.
func unpackKernel(w io.Writer, image []byte) error {
	payload, err := kernelPayload(image)
	if err != nil {
		return err
	}
	unpacked, err := decompress(payload)
	if err != nil {
		return fmt.Errorf("unpack kernel: %w", err)
	}
	head := make([]byte, len(elf.ELFMAG))
	if _, err := io.ReadFull(unpacked, head); err != nil {
		return fmt.Errorf("unpack kernel: %w", err)
	}
	if string(head) != elf.ELFMAG {
		return errors.New("unpack kernel: what is in it is not an ELF kernel")
	}
	if _, err := w.Write(head); err != nil {
		return err
	}
	n, err := io.Copy(w, io.LimitReader(unpacked, maxKernel))
	if err != nil {
		return fmt.Errorf("unpack kernel: %w", err)
	}
	if n == maxKernel {
		return fmt.Errorf("unpack kernel: larger than %d MiB", maxKernel>>20)
	}
	return nil
}

// hasSetupHeader reports whether a file begins as a bzImage does.
func hasSetupHeader(image []byte) bool {
	return len(image) >= payloadLengthAt+4 && string(image[setupMagicAt:setupMagicAt+4]) == setupMagic
}

// kernelPayload finds the packed kernel in a bzImage.
func kernelPayload(image []byte) ([]byte, error) {
	if !hasSetupHeader(image) {
		return nil, errNotKernel
	}
	if version := binary.LittleEndian.Uint16(image[bootVersionAt:]); version < payloadVersion {
		return nil, fmt.Errorf("is a kernel with boot protocol %#x; %#x or newer is needed", version, payloadVersion)
	}
	sectors := int64(image[setupSectorsAt])
	if sectors == 0 {
		sectors = 4 // by the protocol
	}
	start := (sectors+1)*sectorSize + int64(binary.LittleEndian.Uint32(image[payloadOffsetAt:]))
	length := int64(binary.LittleEndian.Uint32(image[payloadLengthAt:]))
	if length < 8 || start+length > int64(len(image)) {
		return nil, errors.New("is a kernel that is cut short")
	}
	return image[start : start+length], nil
}

// decompress finds out how data is packed.
func decompress(data []byte) (io.Reader, error) {
	// The kernel's build puts the length behind the data, but for gzip, which has
	// it by itself.
	body := data[:max(0, len(data)-4)]
	switch {
	case bytes.HasPrefix(data, []byte{0x1f, 0x8b}):
		packed, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			return nil, err
		}
		packed.Multistream(false)
		return packed, nil
	case bytes.HasPrefix(data, []byte{0x02, 0x21, 0x4c, 0x18}):
		return lz4.NewReader(bytes.NewReader(body)), nil
	case bytes.HasPrefix(data, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return xz.NewReader(bytes.NewReader(body), 0)
	case bytes.HasPrefix(data, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return zstd.NewReader(bytes.NewReader(body), zstd.WithDecoderConcurrency(1))
	}
	return nil, fmt.Errorf("packed in a way that is not known (it begins with % x); gzip, lz4, xz and zstd are", data[:min(len(data), 6)])
}

// writeKernel writes a kernel in the form in which it is booted. The file is empty.
func writeKernel(out *os.File, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	found, err := kernelForm(file)
	if err != nil {
		return err
	}
	if found != formPacked {
		_, err := io.Copy(out, file)
		return err
	}
	packed, err := io.ReadAll(io.LimitReader(file, maxKernel))
	if err != nil {
		return err
	}
	if err := unpackKernel(out, packed); err != nil {
		return err
	}
	if err := checkELF(out); !errors.Is(err, errNoEntry) {
		return err
	}
	// It has no other entry point than that of the bzImage.
	if err := out.Truncate(0); err != nil {
		return err
	}
	_, err = out.WriteAt(packed, 0)
	return err
}

// Kernel returns a kernel of the user's in the form in which it is booted: itself, or
// an unpacked copy that is kept for the next time.
func (s *Store) Kernel(ctx context.Context, path string) (string, error) {
	found, err := formOf(path)
	if err != nil {
		return "", err
	}
	if found != formPacked {
		return path, nil
	}
	id, err := identify(path)
	if err != nil {
		return "", err
	}
	text, err := json.Marshal(id)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(s.dir, kernelsDir)
	kept := filepath.Join(dir, hashOf(text)[:32])
	if _, err := os.Stat(kept); err == nil {
		return kept, nil
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	temp, err := os.CreateTemp(dir, ".kernel-*")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.Remove(temp.Name()) }()
	// What is found here later is not looked at again, so it must not be half of it.
	err = errors.Join(writeKernel(temp, path), temp.Sync())
	if err := errors.Join(err, temp.Close()); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return kept, os.Rename(temp.Name(), kept)
}

// readModule reads a module, which distributions may have compressed.
func readModule(path string) ([]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil || bytes.HasPrefix(text, []byte(elf.ELFMAG)) {
		return text, err
	}
	// decompress takes off a trailer that modules don't have.
	unpacked, err := decompress(append(text, 0, 0, 0, 0))
	if err != nil {
		return nil, fmt.Errorf("unpack module %s: %w", path, err)
	}
	text, err = io.ReadAll(io.LimitReader(unpacked, maxKernel))
	if err != nil {
		return nil, fmt.Errorf("unpack module %s: %w", path, err)
	}
	return text, nil
}
