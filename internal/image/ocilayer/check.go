package ocilayer

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
)

// Check reads the archive of a layer, which is not packed, to its end, and returns the first
// error that [Unpack] would find in an entry by itself. It does not find
// a hard link that leads to nothing, as that depends on the layers below.
func Check(ctx context.Context, r io.Reader, limits Limits) error {
	left := newBudget(limits)
	summed := &summer{r: r, hash: sha256.New(), left: &left.bytes}
	archive := tar.NewReader(summed)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := left.take(header); err != nil {
			return err
		}
		if err := checkEntry(header); err != nil {
			return fmt.Errorf("%.300q: %w", header.Name, err)
		}
	}
	_, err := io.Copy(io.Discard, summed)
	return err
}

// checkEntry checks what can be checked of an entry without a tree.
func checkEntry(header *tar.Header) error {
	if err := check(header); err != nil {
		return err
	}
	base := path.Base(path.Clean(header.Name))
	if len(base) > maxName {
		return fmt.Errorf("the name is longer than %d bytes", maxName)
	}
	switch header.Typeflag {
	case tar.TypeDir, tar.TypeReg, tar.TypeLink, tar.TypeFifo, tar.TypeXGlobalHeader:
		return nil
	case tar.TypeSymlink:
		if header.Linkname == "" {
			return errNowhere
		}
		return nil
	case tar.TypeChar, tar.TypeBlock:
		return checkDevice(header)
	}
	return unknownType(header)
}
