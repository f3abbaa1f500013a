package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/smolvm/smolvm/internal/image/ext4fs"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
)

// maxLayeredSize is the largest root file system that is made from layers, in bytes.
const maxLayeredSize = 256 << 30

// LayerOptions are the options of [WriteLayers].
type LayerOptions struct {
	// Limits bound what the layers may make.
	Limits ocilayer.Limits
	// Progress is told how far each layer is; it may be nil.
	Progress ocilayer.Progress
}

// WriteLayers makes a sparse root file system at a path that holds what the layers of an OCI
// image make, the lowest first. It is larger than what it holds, so that the guest can go on writing; the file takes only what it holds.
func WriteLayers(ctx context.Context, path string, layers []ocilayer.Layer, opts LayerOptions) error {
	var seed strings.Builder
	for _, layer := range layers {
		seed.WriteString(layer.DiffID + "\n")
	}
	return writeGrowing(ctx, ext4{path: path, size: rootfsSize, seed: hashOf([]byte(seed.String()))}, layers, opts)
}

// writeGrowing makes a root file system of that size, or a larger one if it is too small.
func writeGrowing(ctx context.Context, made ext4, layers []ocilayer.Layer, opts LayerOptions) error {
	for {
		err := writeLayers(ctx, made, layers, opts)
		if err == nil {
			return nil
		}
		// How much the layers make is known when they are unpacked, and few need more.
		full := errors.Is(err, ext4fs.ErrNoSpace) || errors.Is(err, ext4fs.ErrNoInodes)
		if made.size *= 4; !full || made.size > maxLayeredSize {
			return errors.Join(fmt.Errorf("root file system: %w", err), os.Remove(made.path))
		}
	}
}

func writeLayers(ctx context.Context, made ext4, layers []ocilayer.Layer, opts LayerOptions) error {
	if err := made.format(ctx); err != nil {
		return err
	}
	file, err := os.OpenFile(made.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(fillFromLayers(ctx, file, layers, opts), file.Close())
}

func fillFromLayers(ctx context.Context, file *os.File, layers []ocilayer.Layer, opts LayerOptions) error {
	w, err := ext4fs.NewWriter(file)
	if err != nil {
		return err
	}
	root, err := ocilayer.Unpack(ctx, layers, w, opts.Limits, opts.Progress)
	if err != nil {
		return err
	}
	return w.Close(ctx, root)
}
