// Package durable has files survive a power cut.
package durable

import (
	"errors"
	"os"
)

// Sync writes the content of a file, or the names in a directory, to stable storage.
func Sync(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}
