package wire

// Mount orders the guest to mount a directory of the host.
type Mount struct {
	// Number tells the VM's mounts apart.
	Number int `json:"number"`
	// Target is where it is to be, an absolute path in the guest. What is missing of it is made.
	Target string `json:"target"`
	// Source is what the guest's list of mounts calls it.
	Source string `json:"source"`
	// ReadOnly mounts it so.
	ReadOnly bool `json:"read_only,omitempty"`
	// Again says that the guest has it mounted, and only its stream is another.
	Again bool `json:"again,omitempty"`
}
