package qemu

import (
	"encoding/json"
	"slices"

	"github.com/smolvm/smolvm/internal/vmm"
)

// node is one node of QEMU's graph of block devices, as in BlockdevOptions of its
// qapi/block-core.json. QEMU opens what is named here, and nothing that a file names.
type node struct {
	Name     string   `json:"node-name,omitempty"`
	Driver   string   `json:"driver"`
	ReadOnly bool     `json:"read-only"`
	Discard  string   `json:"discard,omitempty"`
	File     *node    `json:"file,omitempty"`
	Filename string   `json:"filename,omitempty"`
	Backing  *backing `json:"backing,omitempty"`
}

// backing is what a qcow2 node is based on. Without a node it is null: nothing, whatever
// the file's header says.
type backing struct{ *node }

// MarshalJSON implements [json.Marshaler].
func (b backing) MarshalJSON() ([]byte, error) { return json.Marshal(b.node) }

// blockNode describes the disk of a drive, with all that it is based on. Sets are those of its
// files, its own first.
func blockNode(name string, drive vmm.Drive, sets []int) string {
	var below *node
	for i, file := range slices.Backward(drive.Backing) {
		next := diskNode(file, true, sets[i+1])
		next.basedOn(below)
		below = next
	}
	top := diskNode(vmm.DiskFile{Format: drive.Format, Device: drive.Device}, drive.ReadOnly, sets[0])
	top.Name, top.Discard = name, "unmap"
	top.basedOn(below)
	text, err := json.Marshal(top)
	if err != nil {
		panic(err) // strings and booleans always encode
	}
	return string(text)
}

func diskNode(file vmm.DiskFile, readOnly bool, set int) *node {
	protocol := &node{Driver: "file", ReadOnly: readOnly, Discard: "unmap", Filename: fdsetPath(set)}
	if file.Device {
		protocol.Driver = "host_device"
	}
	return &node{Driver: file.Format, ReadOnly: readOnly, File: protocol}
}

// basedOn says what a node is based on. Only qcow2 can be based on anything.
func (n *node) basedOn(below *node) {
	if n.Driver == "qcow2" {
		n.Backing = &backing{below}
	}
}
