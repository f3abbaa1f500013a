// Command containerd applies layers to a directory as containerd does: what package image makes
// of the same layers is compared with that. It is a module of its own, as nothing else needs
// containerd. Arguments: the directory, and the layers' archives, not packed.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/pkg/archive"
)

func main() {
	if err := apply(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func apply(dir string, layers []string) error {
	for _, path := range layers {
		layer, err := os.Open(path)
		if err != nil {
			return err
		}
		if _, err := archive.Apply(context.Background(), dir, layer); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if err := layer.Close(); err != nil {
			return err
		}
	}
	return nil
}
