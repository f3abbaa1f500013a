package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// chunk is how much is copied or read between two looks at the context, in bytes.
const chunk = 64 << 20

// Copy makes a copy of a disk file that has nothing in common with the original any
// more: at once where the file system can share blocks (btrfs, xfs), else by copying
// all but the holes. Size is the copy's in bytes: zero means the original's, and it
// can't be smaller. If it fails, nothing is left.
func Copy(ctx context.Context, target, source string, size int64) error {
	in, err := os.Open(source)
	if err != nil {
		return fmt.Errorf("copy disk: %w", err)
	}
	defer func() { _ = in.Close() }()
	info, err := in.Stat()
	if err != nil {
		return fmt.Errorf("copy disk: %w", err)
	}
	if size == 0 {
		size = info.Size()
	}
	if size < info.Size() {
		return fmt.Errorf("copy disk %s: %d bytes are fewer than the %d that it has", source, size, info.Size())
	}
	err = writeFile(target, link, func(out *os.File) error {
		if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) != nil {
			if err := copyData(ctx, out, in, info.Size()); err != nil {
				return err
			}
		}
		return out.Truncate(size)
	})
	if err != nil {
		return fmt.Errorf("copy disk %s: %w", source, err)
	}
	return nil
}

func copyData(ctx context.Context, out, in *os.File, size int64) error {
	return eachExtent(in, size, func(start, end int64) error {
		if _, err := in.Seek(start, io.SeekStart); err != nil {
			return err
		}
		if _, err := out.Seek(start, io.SeekStart); err != nil {
			return err
		}
		for at := start; at < end; at += chunk {
			if err := ctx.Err(); err != nil {
				return err
			}
			// Between two files this is copy_file_range(2).
			if _, err := io.CopyN(out, in, min(chunk, end-at)); err != nil {
				return err
			}
		}
		return nil
	})
}

// Sum returns a hash over what a disk file holds. Holes are as good as zeros, and
// take no time.
func Sum(ctx context.Context, path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return "", err
	}
	// Over the blocks that are not all zero, and where they are: extents begin and
	// end wherever a file system likes, which must make no difference.
	const blockSize = 64 << 10
	hash := sha256.New()
	block, zeros := make([]byte, blockSize), make([]byte, blockSize)
	var next int64
	err = eachExtent(file, info.Size(), func(start, end int64) error {
		for next = max(next, start/blockSize*blockSize); next < end; next += blockSize {
			if err := ctx.Err(); err != nil {
				return err
			}
			n, err := file.ReadAt(block, next)
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if !bytes.Equal(block[:n], zeros[:n]) {
				hash.Write(binary.BigEndian.AppendUint64(nil, uint64(next)))
				hash.Write(block[:n])
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	hash.Write(binary.BigEndian.AppendUint64(nil, uint64(info.Size())))
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// eachExtent calls do for each part of a file that is not a hole, in order.
func eachExtent(file *os.File, size int64, do func(start, end int64) error) error {
	for end := int64(0); end < size; {
		start, err := unix.Seek(int(file.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return fmt.Errorf("find data: %w", err)
		}
		if end, err = unix.Seek(int(file.Fd()), start, unix.SEEK_HOLE); err != nil {
			return fmt.Errorf("find hole: %w", err)
		}
		if err := do(start, end); err != nil {
			return err
		}
	}
	return nil
}
