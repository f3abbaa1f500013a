// Package embedded carries the smolvm-agent program inside the smolvm program,
// so that one file is all there is to install. Only a build with the tag
// embedagent does (`make build`): a plain `go build` must work in a tree in which
// the agent has not been built.
package embedded

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// ErrNotBuiltIn reports that this program carries no agent.
var ErrNotBuiltIn = errors.New("no agent is built into this program")

// Extract puts the agent into dir, if it is not there yet, and returns its path.
// The file's name holds the agent's hash, so a newer agent never replaces one
// that is being read.
func Extract(dir string) (string, error) {
	if len(compressed) == 0 {
		return "", ErrNotBuiltIn
	}
	path := filepath.Join(dir, "smolvm-agent-"+strings.TrimSpace(digest)[:16])
	if _, err := os.Stat(path); err == nil {
		return path, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("find agent: %w", err)
	}
	if err := write(dir, path); err != nil {
		return "", fmt.Errorf("unpack agent: %w", err)
	}
	return path, nil
}

func write(dir, path string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	unpacked, err := gzip.NewReader(bytes.NewReader(compressed))
	if err != nil {
		return err
	}
	temp, err := os.CreateTemp(dir, ".agent-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(temp.Name()) }()
	_, copyErr := io.Copy(temp, unpacked)
	if err := errors.Join(copyErr, temp.Chmod(0o755), temp.Sync(), temp.Close()); err != nil {
		return err
	}
	return os.Rename(temp.Name(), path)
}
