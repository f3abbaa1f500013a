package shim

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/secret"
	"github.com/smolvm/smolvm/internal/vmm"
)

// Spec is what a shim is to run. It travels as JSON on the shim's standard input.
type Spec struct {
	// Protocol is what a shim must know to do as it is told. Zero: from before it was told;
	// [Launch] and [Claim] send the number that the rest of the order needs then.
	Protocol int `json:"protocol,omitempty"`
	// ID of the VM, and Run, which is unique to this start of it.
	ID  string `json:"id"`
	Run string `json:"run"`

	Backend string     `json:"backend"`
	VMM     vmm.Config `json:"vmm"`
	// Network is the VM's network; nil: the VM has none. A mode that the shim does not know
	// is refused.
	Network *network.Config `json:"network,omitempty"`
	// Secrets are put into the guest's flows; see package intercept. They are never written
	// down: orders and claims travel over pipes and sockets only.
	Secrets []secret.Secret `json:"secrets,omitempty"`
	// Mounts are directories of the host that the guest is to have. They need a Hello.
	Mounts []smolvm.Mount `json:"mounts,omitempty"`
	// User is the user of the guest that all in them is owned by. Empty: root.
	User string `json:"user,omitempty"`
	// Health is how to find out whether what runs in the guest works; nil: nobody wants to know.
	// It needs a Hello.
	Health *Health `json:"health,omitempty"`
	// Forwards are set up at the start. The launcher has bound their ports
	// already; see [Launch].
	Forwards []Forward `json:"forwards,omitempty"`

	// Hello makes the shim wait for an agent in the guest and tell it who it is; nil:
	// the guest has none. Its Time, its Seed and the domains to search are filled in by
	// the shim.
	Hello *wire.Hello `json:"greeting,omitempty"`
	// WarmUp is a line of shell that the guest runs before it is ready; empty: none.
	WarmUp string `json:"warm_up,omitempty"`
	// InSession says that the guest was saved in the middle of a session with its
	// agent; see [agent.Reset].
	InSession bool `json:"in_session,omitempty"`
	// Standby makes the shim bring its VM up, take it through a login, and hold it,
	// until it is claimed for another Spec; see [Claim].
	Standby bool `json:"standby,omitempty"`
	// Freeze makes the shim save its VM instead of running it; see [Freeze].
	Freeze *FreezeOrder `json:"freeze,omitempty"`
	// Ready says what to wait for, at most ReadyTimeout from the VMM's start.
	Ready        smolvm.ReadyCondition `json:"ready"`
	ReadyTimeout time.Duration         `json:"ready_timeout_ns"`

	// TTL stops the VM when it has run for so long. Zero: never.
	TTL time.Duration `json:"ttl_ns,omitempty"`
	// Ephemeral stops the VM when the launcher ends.
	Ephemeral bool `json:"ephemeral,omitempty"`

	// FlowLog is the path of the VM's flow log; empty: what passes is not recorded.
	FlowLog string `json:"flow_log,omitempty"`
	// RuntimeDir holds the shim's two sockets. The shim makes it and removes it.
	RuntimeDir string `json:"runtime_dir"`
	// Origin comes back in [ExitRecord], [HealthRecord] and [HaltRecord].
	Origin Origin `json:"origin"`
}

// Health says how to find out whether what runs in a guest works.
type Health struct {
	// Check has no zeros where there are defaults.
	Check smolvm.Healthcheck `json:"check"`
	// User runs it, and Dir is where; empty: those of the guest.
	User string `json:"user,omitempty"`
	Dir  string `json:"dir,omitempty"`
}

// protocol returns the number that an order is sent with: its own, or the lowest with which
// no shim misunderstands it.
func (s Spec) protocol() int {
	const withMode, withEgress, withRate, withSecrets, withMounts, withHealth = 2, 3, 4, 5, 6, 7
	switch {
	case s.Health != nil:
		return cmp.Or(s.Protocol, withHealth)
	case len(s.Mounts) > 0:
		return cmp.Or(s.Protocol, withMounts)
	case len(s.Secrets) > 0:
		return cmp.Or(s.Protocol, withSecrets)
	case s.Network == nil:
		return cmp.Or(s.Protocol, Protocol)
	case s.Network.UsedMode() == smolvm.NetworkUser && s.Network.Rate != (network.Rate{}):
		return cmp.Or(s.Protocol, withRate)
	case s.Network.Egress != nil:
		return cmp.Or(s.Protocol, withEgress)
	case s.Network.UsedMode() != smolvm.NetworkUser:
		return cmp.Or(s.Protocol, withMode)
	}
	return cmp.Or(s.Protocol, Protocol)
}

// NewRun makes a name for one run of a VM, by which the end of that run is told from the end
// of any other.
func NewRun() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}

// Origin says where the VM of a shim belongs.
type Origin struct {
	// DataDir is the data directory that has the VM's row.
	DataDir string `json:"data_dir"`
	// State of the VM before the start. Empty: it has none.
	State smolvm.VMState `json:"state,omitempty"`
}

// ControlSocket and AgentSocket are the sockets in a VM's runtime directory. On
// the first the shim answers the requests of [Client]; each connection to the
// second is one to the guest's agent.
func ControlSocket(runtimeDir string) string { return filepath.Join(runtimeDir, "ctl") }

// RemoveRuntimeDir removes what a shim that was killed has left.
func RemoveRuntimeDir(runtimeDir string) error {
	var errs []error
	// A shim of an earlier build has links to its VM's drives beside it, or, if it stood by,
	// where another link leads.
	standby, _ := os.Readlink(filepath.Join(runtimeDir, "drives"))
	for _, dir := range []string{runtimeDir, runtimeDir + ".drives", standby} {
		if dir != "" {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// ClaimSocket is where a shim that stands by is claimed.
func ClaimSocket(runtimeDir string) string { return filepath.Join(runtimeDir, "claim") }

// AgentSocket is described at [ControlSocket].
func AgentSocket(runtimeDir string) string { return filepath.Join(runtimeDir, "agent") }

// ExitRecord is what a shim reports when its VM has ended.
type ExitRecord struct {
	ID     string   `json:"id"`
	Run    string   `json:"run"`
	Exit   vmm.Exit `json:"exit"`
	Origin Origin   `json:"origin"`
	// RuntimeDir is that of [Spec].
	RuntimeDir string `json:"runtime_dir"`
	// Committed is false if the launcher died, or gave up, before it confirmed
	// the start.
	Committed bool `json:"committed"`
}

// HealthRecord is what a shim reports when the status of its guest's health has changed.
type HealthRecord struct {
	ID     string        `json:"id"`
	Run    string        `json:"run"`
	Health smolvm.Health `json:"health"`
	Origin Origin        `json:"origin"`
}

// HaltRecord is what a shim reports when the VMM has paused the guest by itself, or when the
// agent of a guest that runs can't be reached any more; without a cause, it can be again.
type HaltRecord struct {
	ID     string `json:"id"`
	Run    string `json:"run"`
	Cause  string `json:"cause"`
	Origin Origin `json:"origin"`
}
