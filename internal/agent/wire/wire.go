// Package wire holds what the host and the agent in the guest must agree on:
// the hello that opens the guest channel, and the names of what smolvm adds
// to SSH. It imports nothing but the standard library and yamux, so that the agent
// stays small.
//
// # The guest channel
//
// The channel is one ordered byte stream: a virtio-serial port or a vsock
// connection. (Over vsock, the host may connect again; the agent goes on with its newest
// connection, and is the same guest.) The host speaks first, because bytes that a guest
// writes to a virtio port with no host connected are lost:
//
//	host  -> guest   Hello   (identity, network, keys, clock)
//	guest -> host    Answer     (what the agent is and has done)
//
// After that the stream carries yamux, with the host as its client. What a yamux
// stream is that the host opens is known by its first bytes:
//
//   - One channel, as SSH has them, without SSH: see package plain. All that smolvm itself
//     does in a guest goes this way.
//   - One SSH connection, with the guest as server, for everybody else. (An SSH client
//     speaks first too, with "SSH-", so the agent need not wait.)
//   - A message: one control exchange. The host sends a [Control], the guest answers with
//     a [ControlAnswer] and closes the stream. Control is for the shim, which must be able
//     to shut a guest down with no client at hand.
//
// A message is a line "SMOLVM <length>\n" and so many bytes of JSON. When the
// host end closes or the session ends, the agent says so by an Answer with Again, and
// waits for the next hello; a reader skips everything before the first "SMOLVM ",
// so bytes left over from an earlier session do no harm.
//
// A guest that was saved in the middle of a session resumes with that session open. Its
// new host sends [Break], which ends the session whatever part of a frame the guest has
// got, and waits for the Again.
//
// A later hello to the same guest (after a restore, in a clone) gives it a
// new identity: every part of it is applied again.
package wire

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/netip"
	"time"
)

const (
	// PortName is the name of the guest channel's virtio-serial port; the guest
	// finds it at /sys/class/virtio-ports/*/name.
	PortName = "smolvm.agent"
	// VsockArg is the kernel's argument that names the vsock port on which the agent
	// listens for the host, instead of looking for the virtio-serial port.
	VsockArg = "smolvm.vsock"
	// SSHPort is the TCP port on which the agent also serves SSH.
	SSHPort = 22
	// MaxMessage bounds a message, in bytes.
	MaxMessage = 1 << 20

	// Magic begins every message.
	Magic = "SMOLVM "
)

// Protocol is the number of what host and agent say to each other. It grows only when one
// that knows the number before would misunderstand the other; fields that may be ignored
// come without.
const Protocol = 1

// HelloProtocol is the highest number of a [Hello] that this build's agents know. Most have
// [Protocol]. One with a network without a fixed address of IPv4 has 2: an agent from before
// would end for want of that address. One with mounts has 3: an agent from before would leave
// them out.
const HelloProtocol = withMounts

const (
	withoutAddress = 2
	withMounts     = 3
)

// Needs returns the number that a hello is sent with: the lowest with which no agent
// misunderstands it.
func (h Hello) Needs() int {
	switch n := h.Network; {
	case h.Mounts > 0:
		return withMounts
	case n != nil && !n.Address.IsValid():
		return withoutAddress
	}
	return Protocol
}

// The names of smolvm's additions to SSH. Everything else is the standard: "session" channels
// with exec, shell, pty-req, env, window-change, signal, the sftp subsystem, and
// "direct-tcpip" channels.
const (
	// ExecChannel is a channel type whose open request carries an [ExecRequest]
	// as JSON: one round trip fewer than a session, and exact arguments. The
	// channel then behaves as a session does after exec: data, extended data 1
	// for stderr, "signal", "window-change" and "eow@openssh.com" requests, and at the
	// end "exit-status" or "exit-signal". The signal KILL is for all that the command
	// has started, others are for its process group. A command that can't be started
	// is reported on stderr with exit status 127 (not found) or 126.
	ExecChannel = "exec@smolvm"
	// ReadyChannel is a channel type without data. It is opened once the guest has run a
	// program since it was booted or restored.
	ReadyChannel = "ready@smolvm"
	// PIDRequest is a request on such a channel by which the host asks for the process id
	// of the command. The agent sends a request of the same name with the id, a uint32,
	// before it replies; an older one refuses the request.
	PIDRequest = "pid@smolvm"
)

// Hello is the host's first message: who the guest is to be.
type Hello struct {
	// Protocol is what [Hello.Needs] returns. Zero: from before it was told.
	Protocol int `json:"protocol,omitempty"`

	Hostname string `json:"hostname"`
	// MachineID is 32 hexadecimal digits, for /etc/machine-id.
	MachineID string `json:"machine_id"`
	// BootID identifies the guest's boot, for /proc/sys/kernel/random/boot_id: a
	// random UUID. Empty: the kernel's own.
	BootID string `json:"boot_id,omitempty"`
	// HostKey is the SSH host key: an Ed25519 private key as package crypto/ed25519 has
	// it. Keys travel as they are used, as an emulated guest that was just restored
	// pays for every format that it has to read.
	HostKey []byte `json:"host_key"`
	// AuthorizedKeys are the public keys that may log in, in SSH's wire format.
	AuthorizedKeys [][]byte `json:"authorized_keys"`
	// Time sets the guest's clock.
	Time time.Time `json:"time"`
	// Seed is fresh entropy for the kernel's random number generator.
	Seed []byte `json:"seed"`
	// Env is added to the environment of every command.
	Env map[string]string `json:"env,omitempty"`
	// WorkingDir is a directory that is made, with those above it, when a command is to be run
	// in it and it is missing. Empty: none. An agent that does not know of it makes none.
	WorkingDir string `json:"working_dir,omitempty"`
	// Authority is the certificate, as PEM, of an authority that the guest's programs are to
	// trust. It takes the place of the one before. Empty: there is none.
	Authority []byte `json:"authority,omitempty"`
	// Network configures the guest's interface; nil leaves it alone.
	Network *Network `json:"network,omitempty"`
	// Mounts is how many [Mount] orders follow. Unless Continues is set, those of the hello
	// before are gone.
	Mounts int `json:"mounts,omitempty"`
	// Continues says that the guest has run on since the last hello, and only its channel is
	// another: it need not prove that it still runs programs, as one that was restored.
	Continues bool `json:"continues,omitempty"`
}

// Network is the configuration of the guest's interface.
type Network struct {
	// MAC finds the interface. Empty: there is none but loopback.
	MAC string `json:"mac"`
	// Address and Gateway are of IPv4. If Address is not valid and DHCP is false, the interface
	// stays down.
	Address netip.Prefix `json:"address"`
	Gateway netip.Addr   `json:"gateway"`
	// Address6 and Gateway6 are the same of IPv6; not valid: there is none.
	Address6 netip.Prefix `json:"address6,omitzero"`
	Gateway6 netip.Addr   `json:"gateway6,omitzero"`
	// DHCP has the guest ask its network for its addresses and name servers (RFC 2131), and
	// listen to routers of IPv6 (RFC 4862).
	DHCP bool         `json:"dhcp,omitempty"`
	DNS  []netip.Addr `json:"dns"`
	// Search is the domains in which names of one label are looked up.
	Search []string `json:"search,omitempty"`
	// MTU in bytes; zero leaves it alone.
	MTU int `json:"mtu,omitempty"`
}

// Answer is the agent's reply to a [Hello], sent when the guest is ready.
type Answer struct {
	// Protocol is the agent's [Protocol]. Zero: from before it was told.
	Protocol int `json:"protocol,omitempty"`
	// Version of the agent.
	Version string `json:"version"`
	// Kernel release of the guest.
	Kernel string `json:"kernel"`
	// Warnings are things that went wrong and do not keep the guest from
	// working, one sentence each.
	Warnings []string `json:"warnings,omitempty"`
	// Authority reports that the guest has the authority of the hello; an earlier agent knows
	// of none.
	Authority bool `json:"authority,omitempty"`
	// Identity is what the guest has become.
	Identity Identity `json:"identity"`
	// Again reports that a session is over, and that the agent waits for the next
	// hello. It is sent unasked, and nothing else with it.
	Again bool `json:"again,omitempty"`
	// Error says why the guest can't be used; the agent then serves nothing.
	Error string `json:"error,omitempty"`
	// Timeline says when, since the kernel started, each step was done.
	Timeline []Step `json:"timeline,omitempty"`
}

// Identity holds the values that must be unique to each guest, read back from where
// programs and clients find them.
type Identity struct {
	Hostname  string `json:"hostname"`
	MachineID string `json:"machine_id"`
	BootID    string `json:"boot_id"`
	// HostKey is the fingerprint of the SSH host key, as ssh-keygen prints it.
	HostKey string `json:"host_key"`
	// MAC of the interface; empty if the network is not set up yet.
	MAC string `json:"mac,omitempty"`
	// Random is drawn from the kernel's generator after the hello's seed has been
	// mixed in, in hexadecimal.
	Random string `json:"random"`
}

// Step is one step of the guest's boot.
type Step struct {
	Name string `json:"name"`
	// At is the time since the kernel's start, in nanoseconds in JSON.
	At time.Duration `json:"at_ns"`
}

// Control is one request of the shim's; exactly one field is set.
type Control struct {
	// Sync writes out what the guest's file systems hold. It is answered after that.
	Sync bool `json:"sync,omitempty"`
	// Clock sets the guest's clock.
	Clock *time.Time `json:"clock,omitempty"`
	// Shutdown ends all processes, syncs, unmounts and powers off. It is answered
	// before the shutdown begins.
	Shutdown *Shutdown `json:"shutdown,omitempty"`
	// Ping is answered at once.
	Ping bool `json:"ping,omitempty"`
	// Mount mounts a directory of the host. It is answered when it is mounted; from then on the
	// stream carries the messages of FUSE, requests to the host and answers to the guest.
	Mount *Mount `json:"mount,omitempty"`
	// MountsReady is answered when all that is mounted can be used.
	MountsReady bool `json:"mounts_ready,omitempty"`
}

// Shutdown says how to shut down.
type Shutdown struct {
	// Grace is how long processes may take to end after the signal before they get
	// SIGKILL.
	Grace time.Duration `json:"grace_ns"`
	// Signal is the number of the signal that they get. Zero: SIGTERM, and SIGHUP for
	// shells. An init of the image's own is asked in the way it knows instead.
	Signal int `json:"signal,omitempty"`
}

// ControlAnswer is the agent's reply to a [Control].
type ControlAnswer struct {
	// Owner is the user of a [Mount].
	Owner Owner  `json:"owner,omitzero"`
	Error string `json:"error,omitempty"`
}

// Write writes one message.
func Write(w io.Writer, message any) error {
	body, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encode %T: %w", message, err)
	}
	if len(body) > MaxMessage {
		return fmt.Errorf("%T has %d bytes; at most %d are allowed", message, len(body), MaxMessage)
	}
	// One write, so that the header never travels alone.
	if _, err := w.Write(fmt.Appendf(nil, "%s%d\n%s", Magic, len(body), body)); err != nil {
		return fmt.Errorf("write %T: %w", message, err)
	}
	return nil
}

// Read reads one message into message, skipping whatever stands before it. It
// reads not a byte beyond the message, as r may go on with another protocol.
func Read(r io.Reader, message any) error { return read(r, message, math.MaxInt, MaxMessage) }

// read is Read with limits, in bytes, for what is skipped and for the message.
func read(r io.Reader, message any, maxSkip, maxSize int) error {
	br := byteReader{r: r}
	if err := skipToMagic(r, maxSkip); err != nil {
		return fmt.Errorf("read %T: %w", message, err)
	}
	length := 0
	for digits := 0; ; digits++ {
		b, err := br.ReadByte()
		if err != nil {
			return fmt.Errorf("read %T: %w", message, noEOF(err))
		}
		if b == '\n' && digits > 0 {
			break
		}
		length = length*10 + int(b-'0')
		if b < '0' || b > '9' || length > maxSize {
			return fmt.Errorf("read %T: bad length in the header", message)
		}
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(r, body); err != nil {
		return fmt.Errorf("read %T: %w", message, noEOF(err))
	}
	if err := json.Unmarshal(body, message); err != nil {
		return fmt.Errorf("decode %T: %s", message, Text(err.Error(), maxText)) // it quotes the message
	}
	return nil
}

// skipToMagic reads up to and including the magic. No proper prefix of the magic
// is also a suffix of one, so a mismatch starts again with the byte at hand.
func skipToMagic(r io.Reader, maxSkip int) error {
	var buf [len(Magic)]byte
	for matched, read := 0, 0; matched < len(Magic); {
		if read-matched > maxSkip {
			return fmt.Errorf("%w: there is no message", ErrProtocol)
		}
		n, err := r.Read(buf[:len(Magic)-matched]) // never more than the magic
		read += n
		for _, b := range buf[:n] {
			switch b {
			case Magic[matched]:
				matched++
			case Magic[0]:
				matched = 1
			default:
				matched = 0
			}
		}
		if err != nil && matched < len(Magic) {
			return err
		}
	}
	return nil
}

func noEOF(err error) error {
	if err == io.EOF { //nolint:errorlint // readers return it bare
		return io.ErrUnexpectedEOF
	}
	return err
}

// byteReader reads single bytes without buffering ahead.
type byteReader struct {
	r   io.Reader
	buf [1]byte
}

func (b *byteReader) ReadByte() (byte, error) {
	_, err := io.ReadFull(b.r, b.buf[:])
	return b.buf[0], err
}
