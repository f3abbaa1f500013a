package smolvm

import "time"

// Event is one thing that happened to a VM, as kept in the state database.
type Event struct {
	ID   int64  `json:"id"`
	VMID string `json:"vm_id"`
	// Actor is the process that did it, as "smolvm[pid]" or "shim[pid]".
	Actor string `json:"actor"`
	// Action is what was done: "create", "start", "stop", "exit", ...
	Action string    `json:"action"`
	At     time.Time `json:"at"`
	// Duration is how long it took.
	Duration time.Duration `json:"-"` // "duration_ms"
	// Detail says more, in words: the cause of an exit, the error of a start.
	Detail string `json:"detail,omitempty"`
}

// EventOptions are the options of [Events.Events].
type EventOptions struct {
	// VM is the id of the VM whose events are listed; it need not exist any more. Empty:
	// all events.
	VM string
	// Limit is how many are listed, the newest. Zero: [DefaultEventLimit].
	Limit int
}

// DefaultEventLimit is how many events are listed by default.
const DefaultEventLimit = 100

// WatchOptions are the options of [Events.Watch].
type WatchOptions struct {
	// VM is the id of the VM whose events are wanted. Empty: all events.
	VM string
	// After is the id of the last event that the caller has seen: those since then are
	// yielded first. Zero: only what happens from now on. Negative: all that are kept.
	After int64
}
