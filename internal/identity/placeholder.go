package identity

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"fmt"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// Placeholder returns the hello for a guest that has no VM yet: a throwaway identity
// that no key can log in with.
func Placeholder(network *wire.Network) (wire.Hello, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return wire.Hello{}, err
	}
	return wire.Hello{
		// As short as can be: a name that grows costs a restored guest less than one
		// that shrinks.
		Hostname:  "t",
		MachineID: NewMachineID(),
		BootID:    NewBootID(),
		HostKey:   private,
		Network:   network,
	}, nil
}

// NewBootID makes an identifier as the kernel makes one for each boot: a random UUID.
func NewBootID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func randomHex(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b)
}
