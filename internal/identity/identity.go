// Package identity makes what one guest must not share with another: its keys, its machine
// id, its boot id. It puts them into the hello that the guest is told, and verifies what the
// guest answers.
package identity

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/network"
)

// Guest is what a guest is to become.
type Guest struct {
	Hostname  string
	MachineID string
	// HostKey is that of [NewHostKey].
	HostKey string
	// AuthorizedKeys are lines that [ParseAuthorizedKey] accepts, of who may log in.
	AuthorizedKeys []string
	// Env are variables of every command that is run in the guest.
	Env map[string]string
	// WorkingDir is the directory of commands that name none, which is made if it is missing.
	WorkingDir string
	Network    *wire.Network
}

// Hello returns what the guest is told of itself. Whoever has the client key may log in too.
func (g Guest) Hello(client ssh.PublicKey) (*wire.Hello, error) {
	host, err := hostKey(g.HostKey)
	if err != nil {
		return nil, err
	}
	authorized := [][]byte{client.Marshal()}
	for _, line := range g.AuthorizedKeys {
		key, err := ParseAuthorizedKey(line)
		if err != nil {
			return nil, fmt.Errorf("authorized key %q: %w", line, err)
		}
		authorized = append(authorized, key.Marshal())
	}
	return &wire.Hello{
		Hostname:       g.Hostname,
		MachineID:      g.MachineID,
		HostKey:        host,
		AuthorizedKeys: authorized,
		Env:            g.Env,
		WorkingDir:     g.WorkingDir,
		Network:        g.Network,
	}, nil
}

// NetworkOf returns what a guest is told of a network that was planned.
func NetworkOf(at network.Addresses) *wire.Network {
	told := &wire.Network{MAC: at.MAC, Gateway: at.Gateway, Gateway6: at.Gateway6, DHCP: at.Mode == network.Bridge}
	if at.Guest.IsValid() {
		told.Address, told.DNS = netip.PrefixFrom(at.Guest, at.Prefix.Bits()), []netip.Addr{at.DNS}
	}
	if at.Guest6.IsValid() {
		told.Address6 = netip.PrefixFrom(at.Guest6, at.Prefix6.Bits())
	}
	return told
}

// Verify compares what a guest says of itself with what it was told, and returns the names of
// the parts that agree. Of what it was not told, the database sees to it that no other VM has
// said the same. Only a guest that was restored is told its boot id: one that boots has its
// kernel's.
func Verify(told wire.Hello, said wire.Identity, restored bool) (verified []string, err error) {
	hostKey, err := ssh.NewSignerFromKey(ed25519.PrivateKey(told.HostKey))
	if err != nil {
		return nil, fmt.Errorf("SSH host key: %w", err)
	}
	var mac string
	if told.Network != nil {
		mac = told.Network.MAC
	}
	for _, part := range []struct {
		name, told, said string
		optional         bool
	}{
		{"hostname", told.Hostname, said.Hostname, false},
		{"machine-id", told.MachineID, said.MachineID, false},
		{"SSH host key", ssh.FingerprintSHA256(hostKey.PublicKey()), said.HostKey, false},
		{"boot id", told.BootID, said.BootID, !restored},
		{"MAC", mac, said.MAC, said.MAC == ""},
	} {
		switch {
		case part.told == part.said:
			verified = append(verified, part.name)
		case !part.optional:
			return nil, fmt.Errorf("the guest's %s is %q, not %q", part.name, part.said, part.told)
		}
	}
	if said.Random == "" {
		return nil, errors.New("the guest has shown no random numbers")
	}
	return append(verified, "random numbers"), nil
}
