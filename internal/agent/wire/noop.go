package wire

// NoopArgument is the argument by which the agent's program ends at once.
const NoopArgument = "noop"

// Noop returns a command that does nothing, and that is there in every guest.
func Noop() []string { return []string{"/proc/self/exe", NoopArgument} }
