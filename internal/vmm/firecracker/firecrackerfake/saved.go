package firecrackerfake

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

// save writes a memory of which two pages hold something, as Firecracker writes one: whole.
func (s *Server) save(body []byte) error {
	var p struct {
		Memory string `json:"mem_file_path"`
		State  string `json:"snapshot_path"`
	}
	if err := json.Unmarshal(body, &p); err != nil {
		return err
	}
	if !s.paused {
		return errors.New("Operation not allowed: save/restore of a running microVM") //nolint:staticcheck // as Firecracker
	}
	state, err := json.Marshal(Saved{Version: s.opts.Version, MemoryMiB: s.memoryMiB})
	if err == nil {
		err = os.WriteFile(p.State, state, 0o600)
	}
	if err != nil {
		return fmt.Errorf("Cannot perform open on the snapshot backing file: %w", err) //nolint:staticcheck // as above
	}
	memory := make([]byte, s.memoryMiB<<20)
	const pageSize = 4096
	for _, at := range []int{pageSize, len(memory) - 1} {
		memory[at] = 1
	}
	if err := os.WriteFile(p.Memory, memory, 0o600); err != nil {
		return fmt.Errorf("Cannot perform open on the memory backing file: %w", err) //nolint:staticcheck // as above
	}
	return nil
}

func (s *Server) load(body []byte) error {
	var p struct {
		State  string `json:"snapshot_path"`
		Memory struct {
			Path string `json:"backend_path"`
		} `json:"mem_backend"`
		Resume bool `json:"resume_vm"`
	}
	if err := json.Unmarshal(body, &p); err != nil {
		return err
	}
	text, err := os.ReadFile(p.State)
	if err != nil {
		return fmt.Errorf("Load snapshot error: Failed to restore from snapshot: %w", err) //nolint:staticcheck // as above
	}
	var from Saved
	if err := json.Unmarshal(text, &from); err != nil {
		return fmt.Errorf("Load snapshot error: Failed to deserialize: %w", err) //nolint:staticcheck // as above
	}
	if from.Version != s.opts.Version {
		return fmt.Errorf("Load snapshot error: Invalid data format version %s", from.Version) //nolint:staticcheck // as above
	}
	if _, err := os.Stat(p.Memory.Path); err != nil {
		return fmt.Errorf("Load snapshot error: Failed to load guest memory: %w", err) //nolint:staticcheck // as above
	}
	s.memoryMiB, s.started, s.paused = from.MemoryMiB, true, !p.Resume
	return s.start(&from)
}
