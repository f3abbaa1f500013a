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
	// Overlay keeps what the guest changes apart, on its own disk, under this name: letters and
	// digits. Empty: the guest changes the directory itself.
	Overlay string `json:"overlay,omitempty"`
	// User is the owner of all files in it: [ControlAnswer].Owner has the numbers.
	User string `json:"user,omitempty"`
	// Again is set if the guest has it mounted already, and gets another stream for it.
	Again bool `json:"again,omitempty"`
}

// Owner is a user and a group of the guest.
type Owner struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
}
