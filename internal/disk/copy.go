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
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/step"
)

// chunk is how much is copied or read between two looks at the context, in bytes.
const chunk = 64 << 20

// CopyOptions says what copy of a raw disk is to be made.
type CopyOptions struct {
	// Path is the path of the copy.
	Path string
	// Base is the disk that is copied. Nobody writes to it meanwhile.
	Base string
	// Size is that of the copy, in bytes. Zero: the base's. It can't be smaller. The part
	// that the base has not reads as zeros.
	Size int64
	// Sectors makes the size a multiple of a sector's, so that a guest sees all of it.
	Sectors bool
	// Replace and Sync are as in [Overlay].
	Replace, Sync bool
}

// Copy makes a copy of a raw disk that has nothing in common with the original any more: at
// once where the file system can share blocks (btrfs, xfs), else by copying all but the holes.
// If it fails, nothing is left.
func Copy(ctx context.Context, o CopyOptions) error {
	in, size, err := openBase(o.Base)
	if err != nil {
		return fmt.Errorf("copy disk: %w", err)
	}
	defer func() { _ = in.Close() }()
	switch {
	case o.Size == 0:
		o.Size = size
	case o.Size < size:
		return fmt.Errorf("copy disk %s: %d bytes are fewer than the %d that it has", o.Base, o.Size, size)
	}
	if o.Sectors {
		o.Size = roundUp(o.Size, 512)
	}
	err = writeFile(o.Path, publisher(o.Replace), func(out *os.File) error {
		shared, err := share(out, in)
		if err == nil && !shared {
			err = copyData(ctx, out, in, size)
		}
		if err == nil {
			err = out.Truncate(o.Size)
		}
		if err == nil && o.Sync {
			err = out.Sync()
		}
		if err == nil {
			step.Reached(ctx, "disk/copied")
		}
		return err
	})
	if err == nil && o.Sync {
		err = durable.Sync(filepath.Dir(o.Path))
	}
	if err != nil {
		return fmt.Errorf("copy disk %s: %w", o.Base, err)
	}
	return nil
}

// openBase opens a raw disk, and returns its size in bytes. It may be a block device, whose
// size is where its end is.
func openBase(path string) (*os.File, int64, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, 0, errors.Join(err, file.Close())
	}
	return file, size, nil
}

// share makes a file a copy of another that has the same blocks, and reports whether the file
// system can do that. What the file had before is gone then.
func share(out, in *os.File) (bool, error) {
	err := unix.IoctlFileClone(int(out.Fd()), int(in.Fd()))
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EIO) {
		return false, os.NewSyscallError("FICLONE", err)
	}
	return err == nil, nil
}

// Shares reports whether a file system can make copies that share blocks (reflinks), in one of
// its directories that can be written to.
func Shares(dir string) bool {
	var files []*os.File
	defer func() {
		for _, file := range files {
			_ = file.Close()
		}
	}()
	for range 2 {
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return false
		}
		files = append(files, os.NewFile(uintptr(fd), dir))
	}
	shared, err := share(files[1], files[0])
	return err == nil && shared
}

// Allocated returns how many bytes of a file are no hole: what a copy of it takes.
func Allocated(path string) (int64, error) {
	file, size, err := openBase(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }()
	var stat unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &stat); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return size, nil
	}
	const blockSize = 512 // of st_blocks, whatever the file system's is; see stat(3type)
	return stat.Blocks * blockSize, nil
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
