package vmmfake

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/smolvm/smolvm/internal/vmm"
)

// state is what the devices are like when a guest is saved. A guest goes on only on the
// same.
type state struct {
	Magic     string   `json:"magic"`
	VCPUs     int      `json:"vcpus"`
	MemoryMiB int      `json:"memory_mib"`
	Drives    []string `json:"drives"` // formats
	// Padding makes a state that is cut one that is not complete.
	Padding string `json:"padding"`
}

const stateMagic = "vmmfake-1"

func (m *machine) state() state {
	s := state{Magic: stateMagic, VCPUs: m.Config.VCPUs, MemoryMiB: m.Config.MemoryMiB}
	for _, d := range m.drives {
		s.Drives = append(s.Drives, d.config.Format)
	}
	s.Padding = fmt.Sprintf("%02000d", 0)
	return s
}

// slowTime is how long a saving takes with [SlowSaving].
const slowTime = 250 * time.Millisecond

// save writes the guest's memory and the devices' state, and leaves the guest held, unless
// it fails: then it goes on as before, and the files are removed.
func (m *machine) save(ctx context.Context, memoryPath, statePath string) (held bool, err error) {
	var made []string
	defer func() {
		if err == nil {
			return
		}
		for _, path := range made {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	create := func(path string) (*os.File, error) {
		file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err == nil {
			made = append(made, path)
		}
		return file, err
	}
	memory, err := create(memoryPath)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, memory.Close()) }()
	devices, err := create(statePath)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, devices.Close()) }()
	if m.has(SlowSaving) {
		select {
		case <-time.After(slowTime):
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
	if m.has(DiesSaving) {
		os.Exit(3) //nolint:forbidigo // as a VMM that crashes
	}
	held = m.cpu.pause()
	defer func() {
		if err != nil && !held {
			m.cpu.resume()
		}
	}()
	if err := ctx.Err(); err != nil {
		return held, err
	}
	if err := json.NewEncoder(memory).Encode(m.guest.memory()); err != nil {
		return held, err
	}
	if err := json.NewEncoder(devices).Encode(m.state()); err != nil {
		return held, err
	}
	if m.hosts != nil {
		m.hosts.reset(m.has(Unheard))
	}
	return held, nil
}

// load returns the memory of a guest that was saved on such a machine.
func (m *machine) load(from vmm.Restore) (*memory, error) {
	var then state
	text, err := os.ReadFile(from.State)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &then); err != nil {
		return nil, fmt.Errorf("state %s: %w", from.State, err)
	}
	if now := m.state(); fmt.Sprint(now) != fmt.Sprint(then) {
		then.Padding, now.Padding = "", ""
		return nil, fmt.Errorf("state %s is of another machine: %+v, and this is %+v", from.State, then, now)
	}
	guest := &memory{}
	if text, err = os.ReadFile(from.Memory); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, guest); err != nil {
		return nil, fmt.Errorf("memory %s: %w", from.Memory, err)
	}
	return guest, nil
}
