package smolvm

// Severity is how much a [Finding] matters.
type Severity string

// Severities, from harmless to fatal.
const (
	SeverityOK      Severity = "ok"      // present and working
	SeverityWarning Severity = "warning" // works, but slower or with less
	SeverityError   Severity = "error"   // the backend can't work
)

// Finding is one thing that was checked about the host.
type Finding struct {
	// Name of what was checked, as in "kvm" or "qemu-system-x86_64".
	Name string `json:"name"`
	// Severity is how much it matters.
	Severity Severity `json:"severity"`
	// Problem says what was found; for a good finding, what is there.
	Problem string `json:"problem"`
	// Why says what needs it.
	Why string `json:"why,omitempty"`
	// Fix is the exact command that fixes it; empty if nothing is to be done.
	Fix string `json:"fix,omitempty"`
}

func (f Finding) String() string {
	s := f.Name + ": " + f.Problem
	if f.Why != "" {
		s += " (" + f.Why + ")"
	}
	if f.Fix != "" {
		s += "; fix: " + f.Fix
	}
	return s
}

// BackendInfo is a backend, and whether it can run VMs on this host.
type BackendInfo struct {
	Name string `json:"name"`
	// Available reports whether VMs can be run by it.
	Available bool `json:"available"`
	// Why says what it lacks if it is not available.
	Why string `json:"why,omitempty"`
}
